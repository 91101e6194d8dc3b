"""`voco ask` on a real checkpoint, real images and a real video: answers, caches, and refused arguments."""

from __future__ import annotations

import io
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import clips
import pytest
import shapes
import torch
import world
from image.kinds import JPEG_12, JPEG_XL, chunk, encode, ramp, with_chunks
from PIL import Image

from pipelines import cli
from voco.commands.ask import AskOptions, CacheMaker, ask, doubled_sizes
from voco.errors import Refused
from voco.ingest.media.decoder import Decoder
from voco.ingest.media.image import check_image
from voco.ingest.media.source import MediaLimits
from voco.ingest.source_row import BadRow
from voco.job.config import Model, Text
from voco.model import build, load, voco_llama, weights
from voco.model.generation import shared_prompt_ids
from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced

LLAMA = shapes.llama(vocabulary=320)
QUESTION = "what color is the left?"


def save(folder: Path, method: str = "voco", tokens: int = 3, template: str = "vicuna_v1", **tower: object) -> Path:
    block = Model.model_validate({"llama": LLAMA, "tower": shapes.tower(image_size=64, **tower)})
    text = Text(template=template)  # type: ignore[arg-type]
    model = build.create_model(block, method, tokens, text, [QUESTION, " red", " green"], seed=1)  # type: ignore[arg-type]
    weights.save_checkpoint(model, weights.own_state(model), folder / "model")
    return folder


def save_video(start: Path, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint that reads the caches of `start` with another language model."""
    model = weights.load_checkpoint(str(start), dtype=dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.language_model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    weights.save_checkpoint(model, weights.own_state(model), folder / "model", keep_compressor=True)
    weights.copy_compressor(str(start), str(folder))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 3 <voco> tokens, two images and a video."""
    folder = tmp_path_factory.mktemp("ask")
    save(folder / "checkpoint")
    for index in range(2):
        (folder / f"{index}.png").write_bytes(world.picture(index)[0])
    (folder / "clip.mp4").write_bytes(clips.clip(12))
    return folder


def answer_and_lines(files: Path, media: list[str], checkpoint: Path | None = None, **options: object) -> tuple[str, str]:
    """The answer, and the lines about both passes."""
    uri = str(checkpoint or files / "checkpoint")
    pieces = list(ask(uri, [str(files / name) for name in media], QUESTION, AskOptions(**options)))  # type: ignore[arg-type]
    lines = [piece for piece in pieces if piece.startswith(("\n\npass 1", "\npass 2"))]
    return "".join(piece for piece in pieces if piece not in lines), "".join(lines)


@pytest.mark.parametrize("keep_system", [False, True])
def test_a_second_question_finds_the_cache(files: Path, tmp_path: Path, keep_system: bool) -> None:
    options = {"cache": str(tmp_path), "max_new_tokens": 8, "keep_system": keep_system}
    first, lines = answer_and_lines(files, ["0.png"], **options)
    again, second_lines = answer_and_lines(files, ["0.png"], **options)
    assert "1 view," in lines
    assert "0 of 1 caches found" in lines
    assert "1 of 1 caches found" in second_lines
    model = load(str(files / "checkpoint"))
    cache = model.compress(model.tower.preprocess(world.picture(0)[0])[None])
    expected = "".join(model.stream(cache, QUESTION, 8))
    assert first == again == expected


def test_images_and_a_video_in_one_question(files: Path, tmp_path: Path) -> None:
    _, lines = answer_and_lines(files, ["0.png", "clip.mp4", "1.png"], cache=str(tmp_path), max_new_tokens=4, frames=5)
    assert "7 views" in lines
    _, lines = answer_and_lines(files, ["clip.mp4", "1.png"], cache=str(tmp_path), max_new_tokens=4, frames=5)
    assert "2 of 2 caches found" in lines
    _, lines = answer_and_lines(files, ["clip.mp4"], cache=str(tmp_path), max_new_tokens=4, frames=4)
    assert "0 of 1 caches found" in lines  # other frames
    assert "pass 1" not in answer_and_lines(files, [], max_new_tokens=2)[1]


def test_fewer_tokens_are_answered_from_the_same_pass(files: Path, tmp_path: Path) -> None:
    answer_and_lines(files, ["0.png"], cache=str(tmp_path), max_new_tokens=8)
    model = load(str(files / "checkpoint"))
    features = list(model.tower(model.tower.preprocess(world.picture(0)[0])[None]))
    for n in (1, 2):
        answer, lines = answer_and_lines(files, ["0.png"], cache=str(tmp_path), max_new_tokens=8, tokens=n)
        assert "1 of 1 caches found" in lines
        (fresh,) = model.compress_features([features], tokens=[n])
        assert answer == "".join(model.stream(fresh, QUESTION, 8))


def test_auto_reads_more_tokens_until_the_model_is_sure(files: Path, tmp_path: Path) -> None:
    """A threshold of 0 stops at one token and one above 1 nowhere; between them it stops where the margin says."""
    common = {"cache": str(tmp_path), "max_new_tokens": 6}
    fixed = {n: answer_and_lines(files, ["0.png", "clip.mp4"], tokens=n, **common)[0] for n in (1, 2, 3)}
    for threshold, read in ((0.0, "read at N = 1"), (1.1, "read at N = 1, 2, 3")):
        answer, lines = answer_and_lines(files, ["0.png", "clip.mp4"], adaptive=threshold, **common)
        assert lines.rstrip().endswith(read)
        assert answer == fixed[int(read[-1])]
    assert [doubled_sizes(n) for n in (1, 2, 3, 8, 12)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8), (1, 2, 4, 8, 12)]
    for media, options in (([], {}), (["0.png"], {"keep_system": True})):
        with pytest.raises(Refused, match="--tokens auto: expected images or videos"):
            answer_and_lines(files, media, adaptive=0.5, **options)


def test_where_views_see_each_other_all_media_are_one_cache(files: Path, tmp_path: Path) -> None:
    save(tmp_path / "none", "none", 1)
    options = AskOptions(cache=str(tmp_path / "kept"), max_new_tokens=4, keep_system=True)
    media = [str(files / "0.png"), str(files / "1.png")]
    printed = "".join(ask(str(tmp_path / "none"), media, QUESTION, options))
    assert "2 views" in printed
    assert "0 of 1 caches found" in printed
    assert "1 of 1 caches found" in "".join(ask(str(tmp_path / "none"), media, QUESTION, options))


def test_any_number_of_frames_in_passes_of_a_few(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, _ = answer_and_lines(files, ["clip.mp4"], cache=None, max_new_tokens=8, frames=5)
    sizes: list[int] = []
    original = voco_llama.VocoLlama.compress_features

    def spy(self: voco_llama.VocoLlama, samples: Any, *arguments: Any, **named: Any) -> Any:
        sizes.extend(len(sample_views) for sample_views in samples)
        return original(self, samples, *arguments, **named)

    monkeypatch.setattr(voco_llama.VocoLlama, "compress_features", spy)
    monkeypatch.setattr("voco.commands.ask.FRAMES_AT_ONCE", 2)
    few, lines = answer_and_lines(files, ["clip.mp4"], cache=None, max_new_tokens=8, frames=5)
    assert sizes == [2, 2, 1]
    assert "5 views" in lines
    assert few == once


@pytest.mark.parametrize("keep_system", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_one_compressor_share_its_caches_and_no_text(
    files: Path, tmp_path: Path, keep_system: bool, dtype: torch.dtype
) -> None:
    """Text that a video checkpoint has read is not shared; caches have the number type of the model that reads them."""
    options = {"cache": str(tmp_path / "kept"), "max_new_tokens": 8, "keep_system": keep_system, "frames": 5}
    compressor = load(str(files / "checkpoint"))
    frames = Video((files / "clip.mp4").read_bytes()).frames(evenly_spaced(12, 5))
    frame_cache = compressor.compress(torch.stack([compressor.tower.preprocess(Image.fromarray(frame)) for frame in frames]))
    answers = []
    for seed in (1, 2):
        checkpoint = save_video(files / "checkpoint", tmp_path / f"video{seed}", seed, dtype)
        model = load(str(checkpoint))
        assert model.dtype == dtype
        answer, lines = answer_and_lines(files, ["clip.mp4"], checkpoint, **options)
        assert f"{seed - 1} of 1 caches found" in lines
        cache = replace(frame_cache, keys=frame_cache.keys.to(dtype), values=frame_cache.values.to(dtype))
        assert answer == "".join(model.stream(cache, QUESTION, 8))
        answers.append(answer)
    assert answers[0] != answers[1], "or equality proves nothing"


def test_an_image_is_one_frame_to_a_video_checkpoint(files: Path, tmp_path: Path) -> None:
    tiled = save(tmp_path / "tiled", grid_pinpoints=[[64, 128], [128, 64]])
    (files / "wide.png").write_bytes(_wide())
    assert "3 views" in answer_and_lines(files, ["wide.png"], tiled, cache=None, max_new_tokens=2)[1]
    video = save_video(tiled, tmp_path / "video", 1)
    assert "1 view," in answer_and_lines(files, ["wide.png"], video, cache=None, max_new_tokens=2)[1]


def _wide() -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(world.picture(0)[0])).resize((120, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_question_that_merges_with_the_shared_text_is_read_without_its_cache(files: Path) -> None:
    model = load(str(files / "checkpoint"))
    shared = shared_prompt_ids(model.tokenizer, model.layout)
    checkpoint, options = str(files / "checkpoint"), AskOptions(cache=None, keep_system=True)
    assert CacheMaker(checkpoint, model, options, [*shared, 5]).text_ids == tuple(shared)
    for prompt in ([*shared[:-1], shared[-1] + 1, 5], shared):
        assert CacheMaker(checkpoint, model, options, prompt).text_ids == ()


def test_a_cache_that_cannot_be_written_does_not_prevent_the_answer(files: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    answer, lines = answer_and_lines(files, ["0.png"], cache=str(tmp_path / "file" / "caches"), max_new_tokens=8)
    assert "; not kept: " in lines
    assert answer == answer_and_lines(files, ["0.png"], cache=None, max_new_tokens=8)[0]


def test_a_checkpoint_of_captions_cannot_read_a_question(files: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"captions \(text\.template: plain\) and cannot read a question"):
        answer_and_lines(files, ["0.png"], save(tmp_path / "align", "none", 0, "plain"), cache=None)


def test_nothing_is_kept_without_a_cache(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, lines = answer_and_lines(files, ["0.png"], cache=None, max_new_tokens=2)
    assert "keeping is off" in lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("media", "options", "message"),
    [
        (["nowhere.png"], {}, "no such file"),
        (["checkpoint/model/config.json"], {}, "expected an image, or a video"),
        (["0.png"], {"tokens": 4}, "--tokens: expected 1 to 3"),
        (["0.png"], {"tokens": 0}, "--tokens: expected 1 to 3"),
        (["0.png", "1.png"], {"keep_system": True}, "--keep-system"),
    ],
)
def test_mistakes_are_refused(files: Path, tmp_path: Path, media: list[str], options: dict[str, object], message: str) -> None:
    with pytest.raises(Refused, match=message):
        answer_and_lines(files, media, cache=str(tmp_path), **options)


def test_the_command(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "ask",
        str(files / "checkpoint"),
        str(files / "0.png"),
        QUESTION,
        "--cache",
        str(tmp_path),
        "--max-new-tokens",
        "4",
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "pass 1, views to caches: " in printed
    assert "pass 2, question to answer: " in printed
    assert cli.main([*arguments, "--temperature", "0.8", "--top-p", "0.9", "--seed", "5", "--tokens", "2", "--stop", "."]) == 0
    assert cli.main(["ask", str(files / "checkpoint"), str(tmp_path / "none.png"), QUESTION]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("decoder", ["pil", "fast"])
def test_unusual_images_are_read_or_refused_as_ingest_does(files: Path, tmp_path: Path, decoder: str) -> None:
    """The same kinds, the same pixels and the same words as a reject's."""
    checkpoint = save(tmp_path / "checkpoint", decoder=decoder)
    reader = load(str(checkpoint))
    transparent = Image.new("LA", (40, 40), (0, 0))
    transparent.paste((0, 255), (0, 0, 20, 40))
    white = Image.new("RGB", (40, 40), "white")
    white.paste((0, 0, 0), (0, 0, 20, 40))
    photo = Image.open(io.BytesIO(world.picture(0)[0])).resize((300, 200))
    text = chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2 << 20)))
    read = {
        "grey.png": (encode(Image.fromarray(ramp()), "PNG"), Image.fromarray(ramp() // 257).convert("L")),
        "transparent.png": (with_chunks(encode(transparent, "PNG"), text), white),
        "photo.avif": (encode(photo, "AVIF"), None),
        "photo.jpg": (encode(photo, "JPEG"), None),
    }
    for name, (data, same) in read.items():
        (tmp_path / name).write_bytes(data)
        pixels = reader.tower.preprocess(data)[None]
        if same is not None:
            assert (pixels[0].int() - reader.tower.preprocess(same).int()).abs().max() <= 1
        answer, _ = answer_and_lines(tmp_path, [name], checkpoint, cache=None, max_new_tokens=8)
        assert answer == "".join(reader.stream(reader.compress(pixels), QUESTION, 8))
    decoder_process = Decoder()
    limits = MediaLimits("full", 1 << 20, 10_000_000, 200.0, 1 << 20)
    refused = {
        "float.tif": encode(Image.new("F", (4, 4)), "TIFF"), "twelve.jpg": JPEG_12, "xl.jxl": JPEG_XL, "empty.png": b"",
        "scan.jp2": encode(photo, "JPEG2000"), "cut.png": read["transparent.png"][0][:-30],
        "cut.avif": read["photo.avif"][0][:-30],
    }  # fmt: skip
    for name, data in refused.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadRow) as bad:
            check_image(data, limits, decoder_process)
        with pytest.raises(Refused) as caught:
            answer_and_lines(tmp_path, [name], checkpoint, cache=None)
        assert f"({bad.value.reason}: {bad.value.detail})" in str(caught.value)
        assert "\n" not in str(caught.value)
    decoder_process.close()


def test_a_damaged_video_is_refused(files: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.mp4"
    file.write_bytes((files / "clip.mp4").read_bytes()[:300])
    with pytest.raises(Refused, match=r"cut\.mp4"):
        list(ask(str(files / "checkpoint"), [str(file)], QUESTION, AskOptions(cache=None)))
    assert torch.is_grad_enabled()


def test_the_python_example_runs(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/asking.md").read_text()
    (code,) = re.findall(r"```python\n(import voco.model\nfrom voco.model.cache_store.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CHECKPOINT").symlink_to(files / "checkpoint")
    (tmp_path / "image.jpg").write_bytes((files / "0.png").read_bytes())
    exec(code.replace("s3://BUCKET", str(tmp_path)), {})
    assert list((tmp_path / "caches").rglob("*.safetensors"))


@pytest.mark.parametrize("wrong", [["--temperature", "-1"], ["--max-new-tokens", "100000"], ["--frames", "0"], ["--stop", ""]])
def test_numbers_out_of_range_are_refused_in_a_line(files: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    assert cli.main(["ask", str(files / "checkpoint"), str(files / "0.png"), QUESTION, "--no-cache", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1
