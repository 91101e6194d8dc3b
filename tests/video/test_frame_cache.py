"""Caches of real clips: the files have what the model computes of the frames, and the store reads what the files have."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import clips
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapes
import torch
import world
from image.kinds import JPEG_XL
from PIL import Image

from voco.errors import Refused, message_line
from voco.job.config import Model, Text
from voco.model import build, weights
from voco.model.cache import join_caches
from voco.precompute import frame_cache
from voco.precompute.frame_store import FrameStore, check_compressor
from voco.run import units
from voco.store import parquet, schemas, storage
from voco.store.samples import blob_uri
from voco.video.decode import Video


def video_row(index: int, frames: int) -> dict[str, Any]:
    data = clips.clip(frames, offset=index)
    digest = hashlib.sha256(data).hexdigest()
    medium = {"bytes": data, "path": f"{index}.mp4", "format": "mp4", "sha256": digest, "width": 64, "height": 64}
    medium |= {"duration_s": frames / 4, "fps": 4.0, "num_frames": frames}
    talk = [world.conversation("what happens?", "it gets brighter", False)]
    return {
        "sample_id": digest[:32],
        "dataset": "clips",
        "split": "train",
        "modality": "video",
        "media": [medium],
        "conversations": talk,
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("checkpoint")
    block = Model.model_validate(shapes.MODEL)
    model = build.create_model(block, "voco", 2, Text(template="question_answer"), ["what happens?"], seed=3)
    weights.save_checkpoint(model, weights.own_state(model), root / "model")
    return str(root)


@pytest.fixture(scope="module")
def cached(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Caches of three clips of 8, 20 and 1 sampled frames, an image and a text-only row. The second clip is under `blobs/`."""
    root = tmp_path_factory.mktemp("frames")
    listed = [video_row(0, 32), video_row(1, 80), video_row(2, 3), *world.sample_rows(2)]
    (large,) = listed[1]["media"]
    stored = [*listed[:1], {**listed[1], "media": [{**large, "bytes": None}]}, *listed[2:]]
    storage.write_bytes(blob_uri(str(root / "samples"), large["sha256"]), large["bytes"])
    samples = world.write_samples(str(root / "samples"), stored, rows_per_group=2)
    output = str(root / "cache")
    assert frame_cache.list_media_samples(output, [samples], unit_samples=2) == 2  # of four rows with media
    worker = frame_cache.FrameWorker(output, checkpoint, {"fps": 1.0, "batch": 3})
    with parquet.open_parquet(units.work_list_uri(output)) as file:
        frame_cache.write_index(output, [worker(unit, file.read_row_group(unit)) for unit in range(2)])
    return output, [row for row in listed if row["media"]]


def test_decoded_frames_have_the_requested_numbers() -> None:
    video = Video(clips.clip(24, fps=4.0, offset=2))
    assert (video.num_frames, round(video.fps, 3)) == (24, 4.0)
    for number, frame in zip([0, 7, 3, 23], video.frames([0, 7, 3, 23]), strict=True):
        assert abs(float(frame.mean()) - clips.shade(number + 2)) < 4


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 3], lambda data: b"not a video" * 50, lambda data: b""])
def test_damaged_video_is_a_clear_error(damage: Any) -> None:
    with pytest.raises(ValueError, match="video"):
        Video(damage(clips.clip(8)))


def test_a_cached_frame_is_the_models_own_compression_of_it(cached: tuple[str, list[dict[str, Any]]], checkpoint: str) -> None:
    output, listed = cached
    store, model = FrameStore(output), weights.load_checkpoint(checkpoint)
    assert model.tower is not None
    assert [store.frames(row["sample_id"]) for row in listed] == [8, 20, 1, 1]
    for row in listed:
        data = row["media"][0]["bytes"]
        if row["modality"] == "video":
            video = Video(data)
            pictures = [Image.fromarray(frame) for frame in video.frames(list(range(0, video.num_frames, 4)))]
        else:
            pictures = [data]
        alone = join_caches([model.compress(model.tower.preprocess(picture)[None]) for picture in pictures])
        read = store.read(row["sample_id"], range(len(pictures)))
        assert read.key == alone.key
        assert read.tokens == alone.tokens
        for name in ("keys", "values"):
            stored, expected = getattr(read, name), getattr(alone, name)
            assert (stored - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_offsets_order_and_fewer_tokens(cached: tuple[str, list[dict[str, Any]]]) -> None:
    output, listed = cached
    store = FrameStore(output)
    name = listed[1]["sample_id"]
    complete = store.read(name, range(20))
    selected = store.read(name, [13, 2], n=1)
    assert selected.tokens == (1, 1)
    assert torch.equal(selected.keys, complete.keys[:, :, [26, 4]])
    assert store.select_frames(name, 4) == [2, 7, 12, 17]
    assert store.select_frames(name, 100) == list(range(20))
    with pytest.raises(KeyError, match="must read the same samples"):
        store.frames("unknown")


def test_files_have_the_documented_format(cached: tuple[str, list[dict[str, Any]]], checkpoint: str) -> None:
    output, listed = cached
    config = weights.read_config(checkpoint)
    rows = []
    for unit in range(2):
        with pq.ParquetFile(units.part_uri(output, "frame_cache", unit)) as file:
            facts = json.loads(file.schema_arrow.metadata[b"voco.frame_cache"])
            assert facts["shape"] == [2, 2, 2, 8]
            assert facts["dtype"] == "float32"
            assert facts["compressor"] == config["compressor"]
            assert facts["n"] == 2
            assert file.schema_arrow.field("keys").type == pa.binary(2 * 2 * 2 * 8 * 4)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                assert len(set(table["sample_id"].to_pylist())) == 1, "a row group is never of two videos"
                column = file.metadata.row_group(group).column(file.schema_arrow.names.index("keys"))
                assert column.compression == "UNCOMPRESSED"
                assert not column.has_dictionary_page
                rows += table.select(["sample_id", "frame_index", "timestamp_s"]).to_pylist()
    first = [row for row in rows if row["sample_id"] == listed[0]["sample_id"]]
    assert [row["frame_index"] for row in first] == list(range(0, 32, 4))
    assert [row["timestamp_s"] for row in first] == [float(second) for second in range(8)]


def test_an_image_of_a_kind_that_is_not_read_is_a_reject_with_that_reason(checkpoint: str, tmp_path: Path) -> None:
    good, unread = world.sample_rows(3)[1:]
    unread["media"][0]["bytes"] = JPEG_XL
    samples = world.write_samples(str(tmp_path / "samples"), [good, unread])
    output = str(tmp_path / "cache")
    frame_cache.list_media_samples(output, [samples], unit_samples=5)
    with parquet.open_parquet(units.work_list_uri(output)) as file:
        record = frame_cache.FrameWorker(output, checkpoint, {"fps": 1.0})(0, file.read_row_group(0))
    assert record["counts"] == {"read": 2, "written": 1, "rejected": 1}
    assert [reject["reason"] for reject in record["rejects"]] == ["unsupported_format"]


def test_a_sample_with_a_frame_that_cannot_be_decoded_is_a_reject_and_not_in_the_index(checkpoint: str, tmp_path: Path) -> None:
    good = video_row(0, 32)
    broken = {**video_row(2, 8), "sample_id": "f" * 32}
    broken["media"][0]["bytes"] = b"no video"
    samples = world.write_samples(str(tmp_path / "samples"), [good, broken])
    output = str(tmp_path / "cache")
    frame_cache.list_media_samples(output, [samples, samples], unit_samples=5)  # named twice, cached once
    with parquet.open_parquet(units.work_list_uri(output)) as file:
        assert file.metadata.num_rows == 2
        record = frame_cache.FrameWorker(output, checkpoint, {"fps": 1.0})(0, file.read_row_group(0))
    assert record["counts"] == {"read": 2, "written": 8, "rejected": 1}
    assert [reject["reason"] for reject in record["rejects"]] == ["corrupt_media"]
    frame_cache.write_index(output, [record])
    store = FrameStore(output)
    assert store.rejected == {"f" * 32}
    assert store.frames(good["sample_id"]) == 8
    assert "f" * 32 not in store.groups


def test_rejects_are_the_same_in_every_run(checkpoint: str, tmp_path: Path) -> None:
    """Pillow's message names the object in memory that it read from, and its own objects in capital digits."""
    shown = message_line(ValueError(f"cannot save {Image.new('RGB', (8, 8))!r}"))
    assert shown == "cannot save <PIL.Image.Image image mode=RGB size=8x8>"
    row = next(row for row in world.sample_rows(2) if row["media"])
    row["media"][0]["bytes"] = b"no image"
    samples = world.write_samples(str(tmp_path / "samples"), [row])
    for name in ("a", "b"):
        output = str(tmp_path / name)
        frame_cache.list_media_samples(output, [samples], unit_samples=5)
        with parquet.open_parquet(units.work_list_uri(output)) as file:
            record = frame_cache.FrameWorker(output, checkpoint, {"fps": 1.0})(0, file.read_row_group(0))
        assert "image" in record["rejects"][0]["detail"]
        assert "0x" not in record["rejects"][0]["detail"]
    first, second = (Path(units.part_uri(str(tmp_path / name), "rejects", 0)).read_bytes() for name in ("a", "b"))
    assert first == second


def test_caches_of_another_maker_or_too_few_tokens_are_refused(cached: tuple[str, list[dict[str, Any]]], checkpoint: str) -> None:
    store, config = FrameStore(cached[0]), weights.read_config(checkpoint)
    check_compressor(store, config, 2)
    for wrong in ({"compressor": "f" * 64}, {"preprocessing": "other"}):
        with pytest.raises(Refused, match=f"was made with {next(iter(wrong))}"):
            check_compressor(store, {**config, **wrong}, 2)
    with pytest.raises(Refused, match="expected at most the 2 tokens of each cached frame, got 3"):
        check_compressor(store, config, 3)


def test_row_groups_stay_below_their_limit(
    cached: tuple[str, list[dict[str, Any]]], checkpoint: str, monkeypatch: Any, tmp_path: Path
) -> None:
    """With room for seven frames of 2 x 256 bytes in a group, twenty frames are three groups and read the same."""
    output, listed = cached
    monkeypatch.setattr(schemas, "FRAME_GROUP_BYTES", 7 * 2 * 256)
    samples = world.write_samples(str(tmp_path / "samples"), [listed[1]])
    frame_cache.list_media_samples(str(tmp_path / "cache"), [samples], unit_samples=2)
    with parquet.open_parquet(units.work_list_uri(str(tmp_path / "cache"))) as file:
        record = frame_cache.FrameWorker(str(tmp_path / "cache"), checkpoint, {"fps": 1.0})(0, file.read_row_group(0))
    frame_cache.write_index(str(tmp_path / "cache"), [record])
    assert [group["frames"] for group in record["index"]] == [7, 7, 6]
    name = listed[1]["sample_id"]
    small, large = FrameStore(str(tmp_path / "cache")).read(name, range(20)), FrameStore(output).read(name, range(20))
    assert (small.keys - large.keys).abs().max() <= 1e-5
