"""Caches of real clips: the files have what the model computes of the frames, and the store reads what the files have."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapes
import torch
import world
from image.kinds import JPEG_XL
from PIL import Image

from voco.commands import estimate
from voco.commands.estimate import Volume
from voco.commands.rates import Rates
from voco.commands.shapes import checkpoint_model
from voco.errors import Refused, message_line
from voco.job.config import FrameCache, Model, Text
from voco.job.resources import Resources
from voco.model import build, weights
from voco.model.cache import join_caches
from voco.model.voco_llama import VocoLlama
from voco.precompute import features, frame_cache
from voco.precompute.frame_store import FrameStore, check_compressor
from voco.precompute.frame_tensors import quantise
from voco.run import units
from voco.store import index, number_types, parquet, plain_parquet, schemas, storage
from voco.store.s3 import StorageLost
from voco.store.samples import blob_uri, read_at
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
    listing = units.WorkList(output)
    frame_cache.write_index(output, [worker(unit, listing.read(unit)) for unit in range(2)])
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
        read = store.read(row["sample_id"], range(len(pictures))).joined()
        assert read.key == alone.key
        assert read.tokens == alone.tokens
        for name in ("keys", "values"):
            stored, expected = getattr(read, name), getattr(alone, name)
            assert (stored - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("tiles", [False, True])
def test_images_with_stored_features_are_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiles: bool) -> None:
    """Beside videos, and an image that the features lack: the same file as without features, but for the tower's work."""
    tower = shapes.tower(grid_pinpoints=[[32, 64], [64, 32]]) if tiles else shapes.TOWER
    block = Model.model_validate({**shapes.MODEL, "tower": tower})
    model = build.create_model(block, "voco", 2, Text(template="question_answer"), ["what happens?"], seed=3)
    assert model.tower is not None
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "model")
    listed = [*world.sample_rows(4, text_every=0), video_row(0, 8)]
    samples = world.write_samples(str(tmp_path / "samples"), listed, rows_per_group=2)
    known = world.write_samples(str(tmp_path / "known"), listed[:3], rows_per_group=2)
    stored = str(tmp_path / "features")
    count = features.list_images(stored, [known], 100)
    for unit in range(count):
        features.FeatureWorker(stored, model.tower.config, 8, threads=1)(unit, units.WorkList(stored).read(unit))
    index.join_pieces(stored, count, schemas.FEATURES_INDEX)
    frame_cache.check_stored_features(stored, str(tmp_path))
    seen: list[int] = []
    original = VocoLlama.encode_pixels
    monkeypatch.setattr(VocoLlama, "encode_pixels", lambda self, pixels: seen.append(len(pixels)) or original(self, pixels))
    tables, views = [], []
    for name, given in (("plain", None), ("given", stored)):
        output = str(tmp_path / name)
        frame_cache.list_media_samples(output, [samples], unit_samples=10)
        worker = frame_cache.FrameWorker(output, str(tmp_path), {"fps": 1.0, "batch": 4}, features=given)
        seen.clear()
        worker(0, units.WorkList(output).read(0))
        views.append(sum(seen))
        tables.append(parquet.read_table(units.part_uri(output, "frame_cache", 0)))
    assert views == [6, 3]  # four images and two frames, without the three images that are stored
    for name in ("sample_id", "frame_index"):
        assert tables[0][name] == tables[1][name]
    for name in ("keys", "values"):
        plain, given = (np.frombuffer(b"".join(table[name].to_pylist()), dtype=np.float32) for table in tables)
        assert np.abs(plain - given).max() <= 1e-3 * np.abs(plain).max()
        assert np.abs(plain[: len(plain) // 2] - given[len(plain) // 2 :]).max() > 1e-2 * np.abs(plain).max()


def test_features_of_another_tower_are_refused(checkpoint: str, tmp_path: Path) -> None:
    samples = world.write_samples(str(tmp_path / "samples"), world.sample_rows(2))
    stored = str(tmp_path / "features")
    count = features.list_images(stored, [samples], 100)
    features.FeatureWorker(stored, shapes.tower(image_size=64), 8, threads=1)(0, units.WorkList(stored).read(0))
    index.join_pieces(stored, count, schemas.FEATURES_INDEX)
    with pytest.raises(Refused, match=r"inputs\.features: expected features of tower [0-9a-f]{12}, the model's, got"):
        frame_cache.check_stored_features(stored, checkpoint)
    frame_cache.check_stored_features(None, checkpoint)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_plan_says_how_many_bytes_are_written(
    cached: tuple[str, list[dict[str, Any]]], checkpoint: str, tmp_path: Path, dtype: str | None
) -> None:
    """Within a tenth, though the frames are a thousandth of a 7B model's and the tables' own bytes count."""
    output, block = str(tmp_path / "cache"), {"fps": 1.0, "batch": 3, "dtype": dtype, "unit_samples": 2}
    samples = world.write_samples(str(tmp_path / "samples"), cached[1], rows_per_group=2)
    count = frame_cache.list_media_samples(output, [samples], unit_samples=2)
    worker, listing = frame_cache.FrameWorker(output, checkpoint, block), units.WorkList(output)
    records = [worker(unit, listing.read(unit)) for unit in range(count)]
    entries = [frame_cache.write_index(output, records), *(record["tables"]["frame_cache"][0] for record in records)]
    volume = Volume(media=4, videos=3, seconds=8 + 20 + 1)
    model = checkpoint_model(checkpoint)
    assert model is not None
    planned = estimate.frame_cache(volume, model, FrameCache.model_validate(block), Resources(), Rates())
    assert sum(record["counts"]["written"] for record in records) == volume.frames(FrameCache.model_validate(block)) == 30
    assert planned.written == pytest.approx(sum(entry["bytes"] for entry in entries), rel=0.1)


def test_offsets_order_and_fewer_tokens(cached: tuple[str, list[dict[str, Any]]]) -> None:
    output, listed = cached
    store = FrameStore(output)
    name = listed[1]["sample_id"]
    complete = store.read(name, range(20)).joined()
    selected = store.read(name, [13, 2], n=1).joined()
    assert selected.tokens == (1, 1)
    assert torch.equal(selected.keys, complete.keys[:, :, [26, 4]])
    assert store.select_frames(name, 4) == [2, 7, 12, 17]
    assert store.select_frames(name, 100) == list(range(20))
    with pytest.raises(KeyError, match="must read the same samples"):
        store.frames("unknown")


def test_text_reads_frames_in_their_files_as_it_reads_tensors(cached: tuple[str, list[dict[str, Any]]], checkpoint: str) -> None:
    """Bit by bit, among samples without frames; and the files stay as they are."""
    output, listed = cached
    store, model = FrameStore(output), weights.load_checkpoint(checkpoint)
    parts = [Path(units.part_uri(output, "frame_cache", unit)) for unit in range(2)]
    before = [part.read_bytes() for part in parts]
    names = [row["sample_id"] for row in listed]
    stored = [store.read(names[0], range(8)), None, store.read(names[1], [0, 3, 6, 13, 2]), store.read(names[3], [0])]
    tensors = [None if cache is None else cache.joined() for cache in stored]
    keys, values = model.place_keys(stored)
    for placed, expected in zip((keys, values), model.place_keys(tensors), strict=True):
        assert placed.shape == (2, 2, (8 + 5 + 1) * 2, 8)
        assert torch.equal(placed, expected)
    assert torch.equal(values, torch.cat([cache.values for cache in tensors if cache is not None], dim=2))
    complete = store.read(names[1], range(20)).joined().values.unflatten(2, (20, 2))
    assert torch.equal(values[:, :, 16:26], complete[:, :, [0, 3, 6, 13, 2]].flatten(2, 3))
    assert not torch.equal(keys[:, :, 16:18], tensors[2].keys[:, :, :2]), "keys are rotated to their slots"  # type: ignore[union-attr]
    assert [part.read_bytes() for part in parts] == before


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


def list_unit(output: str, rows: list[dict[str, Any]], folder: Path) -> pa.Table:
    """The work list of one unit with these rows."""
    samples = world.write_samples(str(folder / "samples"), rows, rows_per_group=2)
    frame_cache.list_media_samples(output, [samples], unit_samples=100)
    return units.WorkList(output).read(0)


def sequential_form(worker: frame_cache.FrameWorker, listed: pa.Table, uri: str) -> list[dict[str, Any]]:
    """The file of a unit by one loop: decode a batch, compress it, and collect dicts of bytes. Returns the index's row groups."""
    frames = []
    for row in read_at(listed.to_pylist(), frame_cache.COLUMNS, media=True):
        frames += [item for item in worker._decode(row) if isinstance(item, frame_cache.Frame)]
    rows = []
    for size in frame_cache.batch_sizes(worker.block.batch):
        batch, frames = frames[:size], frames[size:]
        if not batch:
            break
        cache = worker.model.compress(torch.stack([frame.pixels for frame in batch]))
        for number, frame in enumerate(batch):
            row: dict[str, Any] = {name: getattr(frame, name) for name in frame._fields if name != "pixels"}
            for name in ("keys", "values"):
                tokens = slice(number * cache.key.n, (number + 1) * cache.key.n)
                stored, scales = quantise(getattr(cache, name)[:, :, tokens].contiguous(), worker.writer.stored)
                row[name] = stored.view(torch.uint8).numpy().tobytes()
                row |= {} if scales is None else {f"{name}_scales": scales.numpy().tobytes()}
            rows.append(row)
    size = max(1, number_types.FRAME_GROUP_BYTES // worker.writer.frame_bytes)
    groups, index = [], []
    for (sample_id, medium), of_medium in groupby(rows, key=lambda row: (row["sample_id"], row["media_index"])):
        while group := list(islice(of_medium, size)):
            index.append({"sample_id": sample_id, "media_index": medium, "row_group": len(groups), "frames": len(group)})
            groups.append(pa.Table.from_pylist(group, schema=worker.writer.schema))
    metadata = {schemas.FRAME_CACHE_METADATA: worker.writer.facts}
    plain_parquet.write_plain_table(uri, groups, worker.writer.schema, metadata)
    return index


@pytest.mark.parametrize("dtype", [None, "int8", "fp8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_file_on_threads_is_that_of_one_loop(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None, threads: int
) -> None:
    """Videos longer and shorter than a batch and than a row group, images, and a sample whose second video is none."""
    broken = {**video_row(3, 40), "sample_id": "f" * 32}
    broken["media"].append({**broken["media"][0], "bytes": b"no video"})
    listed_rows = [video_row(0, 32), *world.sample_rows(3)[1:], broken, video_row(1, 80), video_row(2, 3), video_row(4, 9)]
    output, block = str(tmp_path / "cache"), {"fps": 1.0, "batch": 3, "dtype": dtype}
    listed = list_unit(output, listed_rows, tmp_path)
    worker = frame_cache.FrameWorker(output, checkpoint, block, threads)
    monkeypatch.setattr(number_types, "FRAME_GROUP_BYTES", 7 * worker.writer.frame_bytes)
    index = sequential_form(worker, listed, units.part_uri(str(tmp_path / "loop"), "frame_cache", 0))
    before = set(threading.enumerate())
    record = worker(0, listed)
    assert set(threading.enumerate()) <= before
    paths = [Path(units.part_uri(root, "frame_cache", 0)) for root in (output, str(tmp_path / "loop"))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [reject["source"] for reject in record["rejects"]] == ["f" * 32]
    location = {"file": "part-00000.parquet", "part_bytes": paths[0].stat().st_size}
    assert record["index"] == [{**group, **location} for group in index if group["sample_id"] != "f" * 32]
    assert "f" * 32 in {group["sample_id"] for group in index}, "its frames before the error are in the file"
    assert max(group["frames"] for group in record["index"]) == 7
    frames = sum(group["frames"] for group in index)
    assert record["counts"] == {"read": 7, "written": frames, "rejected": 1}


def test_decoding_and_writing_take_no_time_beside_the_forward_passes(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage sleeps, so the machine's load matters little: one after the other, the passes would be 42 % of the time."""
    pause = {"decode": 0.01, "compress": 0.012, "write": 0.006}  # seconds a frame
    listed = list_unit(str(tmp_path), [video_row(index, 80) for index in range(6)], tmp_path)
    worker = frame_cache.FrameWorker(str(tmp_path), checkpoint, {"fps": 1.0, "batch": 16}, threads=1)
    preprocess, compress, quantised = worker.preprocess, worker.model.compress, frame_cache.quantise
    passes = []

    def slow_preprocess(picture: Any) -> torch.Tensor:
        time.sleep(pause["decode"])
        return preprocess(picture)

    def slow_compress(pixels: torch.Tensor) -> Any:
        started = time.monotonic()
        time.sleep(pause["compress"] * len(pixels))
        cache = compress(pixels)
        passes.append(time.monotonic() - started)
        return cache

    def slow_quantise(numbers: torch.Tensor, stored: torch.dtype) -> Any:
        time.sleep(pause["write"] * len(numbers) / 2)  # called for keys and for values
        return quantised(numbers, stored)

    monkeypatch.setattr(worker, "preprocess", slow_preprocess)
    monkeypatch.setattr(worker.model, "compress", slow_compress)
    monkeypatch.setattr(frame_cache, "quantise", slow_quantise)
    started = time.monotonic()
    assert worker(0, listed)["counts"]["written"] == 120
    assert sum(passes) / (time.monotonic() - started) > 0.6


@pytest.mark.parametrize(
    ("part", "name"),
    [(VocoLlama, "compress"), (frame_cache, "quantise"), (frame_cache, "evenly_spaced"), (plain_parquet, "write_plain_table")],
)
def test_an_error_on_any_thread_ends_the_unit_without_a_file_or_a_thread(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Any, name: str
) -> None:
    output = str(tmp_path / "cache")
    listed = list_unit(output, [video_row(index, 40) for index in range(6)], tmp_path)
    worker = frame_cache.FrameWorker(output, checkpoint, {"frames": 8, "batch": 3}, threads=2)
    original, calls = getattr(part, name), itertools.count()

    def fail_late(*args: Any, **keys: Any) -> Any:
        if next(calls) >= (0 if name == "write_plain_table" else 3):
            raise MemoryError("no room")
        return original(*args, **keys)

    monkeypatch.setattr(part, name, fail_late)
    before = set(threading.enumerate())
    with pytest.raises(MemoryError, match="no room"):
        worker(0, listed)
    assert set(threading.enumerate()) <= before
    assert storage.list_names(storage.join(output, "frame_cache")) == []
    monkeypatch.setattr(part, name, original)
    assert worker(0, listed)["counts"]["written"] == 48, "the same worker does the unit again"


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2**-8), ("int8", 0.6 / 127), ("fp8", 2**-4)])
def test_smaller_caches_have_the_bytes_of_the_formula_and_read_as_the_models_type(
    cached: tuple[str, list[dict[str, Any]]], checkpoint: str, tmp_path: Path, dtype: str, bound: float
) -> None:
    exact, output = FrameStore(cached[0]), str(tmp_path / "cache")
    listed = list_unit(output, cached[1], tmp_path)
    record = frame_cache.FrameWorker(output, checkpoint, {"fps": 1.0, "batch": 3, "dtype": dtype})(0, listed)
    frame_cache.write_index(output, [record])
    store = FrameStore(output)
    assert store.key == exact.key
    check_compressor(store, weights.read_config(checkpoint), 2)
    numbers = 2 * 2 * 2 * 2 * 8  # keys and values, layers, kv heads, tokens, head width
    assert record["bytes_per_frame"] == {"bf16": 2 * numbers, "int8": numbers + 2 * 4 * 4, "fp8": numbers + 2 * 4 * 4}[dtype]
    for row in cached[1]:
        frames = range(store.frames(row["sample_id"]))
        read, full = (each.read(row["sample_id"], frames).joined() for each in (store, exact))
        assert read.keys.dtype == full.keys.dtype == torch.float32
        for name in ("keys", "values"):
            small, large = getattr(read, name).unflatten(2, (-1, 2)), getattr(full, name).unflatten(2, (-1, 2))
            most = large.abs().amax((-2, -1), keepdim=True)
            assert bool(((small - large).abs() <= bound * most + 1e-5).all())
            assert not torch.equal(small, large)


@pytest.mark.parametrize("fault", [StorageLost("s3 did not answer"), ValueError("part-00000.parquet: no value of 42 bytes")])
def test_stored_features_that_cannot_be_read_are_no_damaged_image(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """The job fails and its unit runs again later: a reject would leave the sample out for good."""
    rows = world.sample_rows(2, text_every=0)
    listed = list_unit(str(tmp_path / "cache"), rows, tmp_path)
    stored = str(tmp_path / "features")
    count = features.list_images(stored, [str(tmp_path / "samples")], 100)
    features.FeatureWorker(stored, shapes.TOWER, 8, threads=1)(0, units.WorkList(stored).read(0))
    index.join_pieces(stored, count, schemas.FEATURES_INDEX)
    worker = frame_cache.FrameWorker(str(tmp_path / "cache"), checkpoint, {"fps": 1.0, "batch": 4}, 2, stored)

    def fail(position: int) -> np.ndarray:
        raise fault

    assert worker.features is not None
    monkeypatch.setattr(worker.features._values, "read", fail)
    with pytest.raises(type(fault), match=str(fault)):
        worker(0, listed)
    monkeypatch.undo()
    assert worker(0, listed)["counts"] == {"read": 2, "written": 2, "rejected": 0}


def test_an_image_of_a_kind_that_is_not_read_is_a_reject_with_that_reason(checkpoint: str, tmp_path: Path) -> None:
    good, unread = world.sample_rows(3)[1:]
    unread["media"][0]["bytes"] = JPEG_XL
    samples = world.write_samples(str(tmp_path / "samples"), [good, unread])
    output = str(tmp_path / "cache")
    frame_cache.list_media_samples(output, [samples], unit_samples=5)
    record = frame_cache.FrameWorker(output, checkpoint, {"fps": 1.0})(0, units.WorkList(output).read(0))
    assert record["counts"] == {"read": 2, "written": 1, "rejected": 1}
    assert [reject["reason"] for reject in record["rejects"]] == ["unsupported_format"]


def test_a_sample_with_a_frame_that_cannot_be_decoded_is_a_reject_and_not_in_the_index(checkpoint: str, tmp_path: Path) -> None:
    good = video_row(0, 32)
    broken = {**video_row(2, 8), "sample_id": "f" * 32}
    broken["media"][0]["bytes"] = b"no video"
    samples = world.write_samples(str(tmp_path / "samples"), [good, broken])
    output = str(tmp_path / "cache")
    frame_cache.list_media_samples(output, [samples, samples], unit_samples=5)  # named twice, cached once
    listed = units.WorkList(output).read(0)
    assert listed.num_rows == 2
    record = frame_cache.FrameWorker(output, checkpoint, {"fps": 1.0})(0, listed)
    assert record["counts"] == {"read": 2, "written": 8, "rejected": 1}
    assert [reject["reason"] for reject in record["rejects"]] == ["corrupt_media"]
    frame_cache.write_index(output, [record])
    store = FrameStore(output)
    assert store.rejected == {"f" * 32}
    assert store.frames(good["sample_id"]) == 8
    assert "f" * 32 not in store


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
        record = frame_cache.FrameWorker(output, checkpoint, {"fps": 1.0})(0, units.WorkList(output).read(0))
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
    monkeypatch.setattr(number_types, "FRAME_GROUP_BYTES", 7 * 2 * 256)
    samples = world.write_samples(str(tmp_path / "samples"), [listed[1]])
    frame_cache.list_media_samples(str(tmp_path / "cache"), [samples], unit_samples=2)
    listing = units.WorkList(str(tmp_path / "cache"))
    record = frame_cache.FrameWorker(str(tmp_path / "cache"), checkpoint, {"fps": 1.0})(0, listing.read(0))
    frame_cache.write_index(str(tmp_path / "cache"), [record])
    assert [group["frames"] for group in record["index"]] == [7, 7, 6]
    name = listed[1]["sample_id"]
    small, large = (FrameStore(folder).read(name, range(20)).joined() for folder in (str(tmp_path / "cache"), output))
    assert (small.keys - large.keys).abs().max() <= 1e-5
    store = FrameStore(str(tmp_path / "cache"), limit=1)  # below any row group, as 1 GiB is below an hour of video
    groups: list[int] = []
    original = store._files.read_values
    monkeypatch.setattr(store._files, "read_values", lambda *arguments: groups.append(arguments[1]) or original(*arguments))
    assert torch.equal(store.read(name, range(20)).joined().keys, small.keys)
    assert sorted(groups) == [0, 1, 2], "each is read once"
