"""`voco ask` on a real checkpoint, real images and a real video: answers, what is kept, and what is refused."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
import world
from PIL import Image

from pipelines import cli
from voco.commands.ask import AskOptions, CacheMaker, ask
from voco.errors import Refused
from voco.job.config import Model, Text
from voco.model import build, load, voco_llama, weights
from voco.model.generation import shared_prompt_ids
from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced

LLAMA = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocabulary": 320}
QUESTION = "what color is the left?"


def save(folder: Path, method: str = "voco", tokens: int = 3, template: str = "vicuna_v1", **tower: object) -> Path:
    block = Model.model_validate({"llama": LLAMA, "tower": {"name": "efficientnet_lite0", "image_size": 64, **tower}})
    text = Text(template=template)  # type: ignore[arg-type]
    made = build.create_model(block, method, tokens, text, [QUESTION, " red", " green"], seed=1)  # type: ignore[arg-type]
    weights.save_checkpoint(made, weights.own_state(made), folder / "model")
    return folder


def save_video(start: Path, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint that reads the caches of `start` with a language model of its own."""
    made = weights.load_checkpoint(str(start), dtype=dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in made.language_model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    weights.save_checkpoint(made, weights.own_state(made), folder / "model", keep_compressor=True)
    weights.keep_compressor(str(start), str(folder))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 3 <voco> tokens, two images and a video."""
    folder = tmp_path_factory.mktemp("ask")
    save(folder / "checkpoint")
    for index in range(2):
        (folder / f"{index}.png").write_bytes(world.picture(index)[0])
    (folder / "clip.mp4").write_bytes(clips.clip(12))
    return folder


def told(place: Path, media: list[str], checkpoint: Path | None = None, **how: object) -> tuple[str, str]:
    """The answer, and the lines about both passes."""
    where = str(checkpoint or place / "checkpoint")
    pieces = list(ask(where, [str(place / one) for one in media], QUESTION, AskOptions(**how)))  # type: ignore[arg-type]
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
    save(tmp_path / "none", "none", 1)
    how = AskOptions(cache=str(tmp_path / "kept"), max_new_tokens=4, keep_system=True)
    media = [str(place / "0.png"), str(place / "1.png")]
    said = "".join(ask(str(tmp_path / "none"), media, QUESTION, how))
    assert "2 views" in said
    assert "0 of 1 caches found" in said
    assert "1 of 1 caches found" in "".join(ask(str(tmp_path / "none"), media, QUESTION, how))


def test_any_number_of_frames_in_passes_of_a_few(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, _ = told(place, ["clip.mp4"], cache=None, max_new_tokens=8, frames=5)
    sizes: list[int] = []
    original = voco_llama.VocoLlama.compress_features

    def spy(self: voco_llama.VocoLlama, samples: Any, *more: Any, **named: Any) -> Any:
        sizes.extend(len(some) for some in samples)
        return original(self, samples, *more, **named)

    monkeypatch.setattr(voco_llama.VocoLlama, "compress_features", spy)
    monkeypatch.setattr("voco.commands.ask.FRAMES_AT_ONCE", 2)
    few, lines = told(place, ["clip.mp4"], cache=None, max_new_tokens=8, frames=5)
    assert sizes == [2, 2, 1]
    assert "5 views" in lines
    assert few == once


@pytest.mark.parametrize("keep_system", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_one_compressor_share_its_caches_and_no_text(
    place: Path, tmp_path: Path, keep_system: bool, dtype: torch.dtype
) -> None:
    """What a video checkpoint has read is its own alone; caches are in the number type of whoever reads them."""
    how = {"cache": str(tmp_path / "kept"), "max_new_tokens": 8, "keep_system": keep_system, "frames": 5}
    maker = load(str(place / "checkpoint"))
    frames = Video((place / "clip.mp4").read_bytes()).frames(evenly_spaced(12, 5))
    made = maker.compress(torch.stack([maker.tower.preprocess(Image.fromarray(frame)) for frame in frames]))
    answers = []
    for seed in (1, 2):
        checkpoint = save_video(place / "checkpoint", tmp_path / f"video{seed}", seed, dtype)
        model = load(str(checkpoint))
        assert model.dtype == dtype
        answer, lines = told(place, ["clip.mp4"], checkpoint, **how)
        assert f"{seed - 1} of 1 caches found" in lines
        cache = replace(made, keys=made.keys.to(dtype), values=made.values.to(dtype))
        assert answer == "".join(model.stream(cache, QUESTION, 8))
        answers.append(answer)
    assert answers[0] != answers[1], "or equality proves nothing"


def test_an_image_is_one_frame_to_a_video_checkpoint(place: Path, tmp_path: Path) -> None:
    tiled = save(tmp_path / "tiled", grid_pinpoints=[[64, 128], [128, 64]])
    (place / "wide.png").write_bytes(_wide())
    assert "3 views" in told(place, ["wide.png"], tiled, cache=None, max_new_tokens=2)[1]
    video = save_video(tiled, tmp_path / "video", 1)
    assert "1 views" in told(place, ["wide.png"], video, cache=None, max_new_tokens=2)[1]


def _wide() -> bytes:
    held = io.BytesIO()
    Image.open(io.BytesIO(world.picture(0)[0])).resize((120, 60)).save(held, "PNG")
    return held.getvalue()


def test_a_question_that_melts_into_the_kept_text_is_read_without_it(place: Path) -> None:
    model = load(str(place / "checkpoint"))
    shared = shared_prompt_ids(model.tokenizer, model.layout)
    assert CacheMaker(str(place / "checkpoint"), model, AskOptions(cache=None, keep_system=True), [*shared, 5]).text_ids == tuple(
        shared
    )
    for prompt in ([*shared[:-1], shared[-1] + 1, 5], shared):
        assert CacheMaker(str(place / "checkpoint"), model, AskOptions(cache=None, keep_system=True), prompt).text_ids == ()


def test_an_answer_is_worth_more_than_its_cache(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    answer, lines = told(place, ["0.png"], cache=str(tmp_path / "file" / "caches"), max_new_tokens=8)
    assert "; not kept: " in lines
    assert answer == told(place, ["0.png"], cache=None, max_new_tokens=8)[0]


def test_a_checkpoint_of_captions_reads_no_question(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"captions \(text\.template: plain\) and reads no question"):
        told(place, ["0.png"], save(tmp_path / "align", "none", 0, "plain"), cache=None)


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
        list(ask(str(place / "checkpoint"), [str(file)], QUESTION, AskOptions(cache=None)))
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
