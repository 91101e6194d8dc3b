"""`voco ask` on a real checkpoint, real images and a real video: answers, what is kept, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import clips
import pytest
import torch
import world

from pipelines import cli
from voco.ask import Asked, ask
from voco.blocks import Model, Text
from voco.errors import Refused
from voco.model import load, new, weights

LLAMA = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocabulary": 320}
QUESTION = "what color is the left?"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 3 <voco> tokens, two images and a video."""
    folder = tmp_path_factory.mktemp("ask")
    block = Model.model_validate({"llama": LLAMA, "tower": {"name": "efficientnet_lite0", "image_size": 64}})
    made = new.create(block, "voco", 3, Text(template="vicuna_v1"), [QUESTION, " red", " green"], seed=1)
    weights.save(made, weights.own_state(made), folder / "checkpoint" / "model")
    for index in range(2):
        (folder / f"{index}.png").write_bytes(world.picture(index)[0])
    (folder / "clip.mp4").write_bytes(clips.clip(12))
    return folder


def told(place: Path, media: list[str], **how: object) -> tuple[str, str]:
    """The answer, and the lines about both passes."""
    pieces = list(ask(str(place / "checkpoint"), [str(place / one) for one in media], QUESTION, Asked(**how)))  # type: ignore[arg-type]
    lines = [piece for piece in pieces if piece.startswith(("\n\npass 1", "\npass 2"))]
    return "".join(piece for piece in pieces if piece not in lines), "".join(lines)


@pytest.mark.parametrize("keep_system", [False, True])
def test_a_second_question_finds_the_cache(place: Path, tmp_path: Path, keep_system: bool) -> None:
    how = {"cache": str(tmp_path), "max_new_tokens": 8, "keep_system": keep_system}
    first, lines = told(place, ["0.png"], **how)
    again, more = told(place, ["0.png"], **how)
    assert "1 views" in lines
    assert "0 of 1 caches found" in lines
    assert "1 of 1 caches found" in more
    model = load(str(place / "checkpoint"))
    cache = model.compress(model.tower.preprocess(world.picture(0)[0])[None])
    expected = "".join(model.stream(cache, QUESTION, 8))
    assert first == again == expected


def test_images_and_a_video_in_one_question(place: Path, tmp_path: Path) -> None:
    _, lines = told(place, ["0.png", "clip.mp4", "1.png"], cache=str(tmp_path), max_new_tokens=4, frames=5)
    assert "7 views" in lines
    _, lines = told(place, ["clip.mp4", "1.png"], cache=str(tmp_path), max_new_tokens=4, frames=5)
    assert "2 of 2 caches found" in lines
    _, lines = told(place, ["clip.mp4"], cache=str(tmp_path), max_new_tokens=4, frames=4)
    assert "0 of 1 caches found" in lines  # other frames
    assert "pass 1" not in told(place, [], max_new_tokens=2)[1]


def test_fewer_tokens_are_answered_from_the_same_pass(place: Path, tmp_path: Path) -> None:
    told(place, ["0.png"], cache=str(tmp_path), max_new_tokens=8)
    model = load(str(place / "checkpoint"))
    features = list(model.tower(model.tower.preprocess(world.picture(0)[0])[None]))
    for n in (1, 2):
        answer, lines = told(place, ["0.png"], cache=str(tmp_path), max_new_tokens=8, tokens=n)
        assert "1 of 1 caches found" in lines
        (fresh,) = model.compress_features([features], tokens=[n])
        assert answer == "".join(model.stream(fresh, QUESTION, 8))


def test_a_model_that_sees_views_whole_gets_one_cache_of_all(place: Path, tmp_path: Path) -> None:
    block = Model.model_validate({"llama": LLAMA, "tower": {"name": "efficientnet_lite0", "image_size": 64}})
    made = new.create(block, "none", 1, Text(template="vicuna_v1"), [QUESTION], seed=1)
    weights.save(made, weights.own_state(made), tmp_path / "none" / "model")
    how = Asked(cache=str(tmp_path / "kept"), max_new_tokens=4, keep_system=True)
    media = [str(place / "0.png"), str(place / "1.png")]
    said = "".join(ask(str(tmp_path / "none"), media, QUESTION, how))
    assert "2 views" in said
    assert "0 of 1 caches found" in said
    assert "1 of 1 caches found" in "".join(ask(str(tmp_path / "none"), media, QUESTION, how))


def test_nothing_is_kept_without_a_cache(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, lines = told(place, ["0.png"], cache=None, max_new_tokens=2)
    assert "keeping is off" in lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("media", "how", "said"),
    [
        (["nowhere.png"], {}, "no such file"),
        (["checkpoint/model/config.json"], {}, "expected an image, or a video"),
        (["0.png"], {"tokens": 4}, "--tokens: expected 1 to 3"),
        (["0.png"], {"tokens": 0}, "--tokens: expected 1 to 3"),
        (["0.png", "1.png"], {"keep_system": True}, "--keep-system"),
    ],
)
def test_mistakes_are_refused(place: Path, tmp_path: Path, media: list[str], how: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said):
        told(place, media, cache=str(tmp_path), **how)


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "ask",
        str(place / "checkpoint"),
        str(place / "0.png"),
        QUESTION,
        "--cache",
        str(tmp_path),
        "--max-new-tokens",
        "4",
    ]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "pass 1, views to caches: " in said
    assert "pass 2, question to answer: " in said
    assert cli.main([*arguments, "--temperature", "0.8", "--top-p", "0.9", "--seed", "5", "--tokens", "2", "--stop", "."]) == 0
    assert cli.main(["ask", str(place / "checkpoint"), str(tmp_path / "none.png"), QUESTION]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_damaged_video_is_refused(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.mp4"
    file.write_bytes((place / "clip.mp4").read_bytes()[:300])
    with pytest.raises(Refused, match=r"cut\.mp4"):
        list(ask(str(place / "checkpoint"), [str(file)], QUESTION, Asked(cache=None)))
    assert torch.is_grad_enabled()


def test_the_readme_says_how_from_python(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import voco.model\nfrom voco.model.cache_store.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CHECKPOINT").symlink_to(place / "checkpoint")
    (tmp_path / "image.jpg").write_bytes((place / "0.png").read_bytes())
    exec(code.replace("s3://BUCKET", str(tmp_path)), {})
    assert list((tmp_path / "caches").rglob("*.safetensors"))


@pytest.mark.parametrize("wrong", [["--temperature", "-1"], ["--max-new-tokens", "100000"], ["--frames", "0"], ["--stop", ""]])
def test_numbers_out_of_range_are_refused_in_a_line(place: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    assert cli.main(["ask", str(place / "checkpoint"), str(place / "0.png"), QUESTION, "--no-cache", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1
