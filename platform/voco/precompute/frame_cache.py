"""The `frame_cache` job: decodes frames, compresses each alone with the checkpoint's compressor, writes `frame_cache/`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from voco.errors import JobFailed, Refused, message_line
from voco.image.fault import ImageFault
from voco.job.config import FrameCache
from voco.job.tables import METHODS
from voco.model import weights
from voco.model.cache import VocoCache
from voco.model.checkpoint_layout import compressor_uri, own_compressor
from voco.precompute.ahead import consume_behind, flat_map_ahead
from voco.precompute.feature_store import FeatureStore, check_tower
from voco.precompute.frame_tensors import STORED, cache_metadata, dtype_name, quantise, split_frames, to_column
from voco.precompute.pixel_loader import UNDECODABLE
from voco.run import units
from voco.run.unit_records import forget_units
from voco.run.units import part_uri
from voco.store import index, number_types, parquet, plain_parquet, schemas
from voco.store.distinct import distinct_rows
from voco.store.number_types import frame_tensor_bytes
from voco.store.samples import ROW_ADDRESS, images_of, read_at, row_addresses
from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced, thin_evenly

COLUMNS = ["sample_id", "dataset", "modality", "media"]
DECODED_FRAMES = 8  # of a video at a time, in its own size
FIRST_BATCH = 8  # frames of a unit's first pass, for which nothing is decoded yet
DECODED_BATCHES = 2  # whose pixels wait for the forward pass
UNWRITTEN_BATCHES = 2  # whose caches wait for the writer


class Frame(NamedTuple):
    """One decoded frame, and the medium that it is from."""

    sample_id: str
    media_index: int
    frame_index: int  # number in the video
    timestamp_s: float
    pixels: Tensor  # (S, S, 3) uint8, as the tower's `preprocess` makes them; or the image's stored features, (V, C) fp16


class CompressedFrames(NamedTuple):
    """Frames of one forward pass, and their joined cache."""

    frames: list[Frame]
    cache: VocoCache


Reject = dict[str, str]  # a row of REJECTS


class CacheWriter:
    """Writes the frames of one compressor in the number type `stored`; `cache` is any of its caches."""

    def __init__(self, cache: VocoCache, rope: dict[str, Any], stored: torch.dtype) -> None:
        self.stored, self.facts = stored, cache_metadata(cache, rope, stored)
        sizes = frame_tensor_bytes(json.loads(self.facts)["shape"], dtype_name(stored))
        self.schema, self.frame_bytes = schemas.frame_cache_schema(*sizes), 2 * sum(sizes)

    def write(self, uri: str, batches: Iterable[CompressedFrames], index: list[dict[str, Any]]) -> dict[str, Any]:
        """Write a part, return its manifest entry. Adds each row group to `index`: one medium, at most FRAME_GROUP_BYTES."""
        metadata = {schemas.FRAME_CACHE_METADATA: self.facts}
        return plain_parquet.write_plain_table(uri, self._groups(batches, index), self.schema, metadata)

    def _groups(self, batches: Iterable[CompressedFrames], index: list[dict[str, Any]]) -> Iterator[pa.Table]:
        size = max(1, number_types.FRAME_GROUP_BYTES // self.frame_bytes)
        groups = itertools.count()
        runs = itertools.chain.from_iterable(map(self._runs, batches))
        for (sample_id, medium), of_medium in itertools.groupby(runs, key=lambda run: run[0]):
            for table in cut_rows((table for _, table in of_medium), size):
                group = {"sample_id": sample_id, "media_index": medium, "row_group": next(groups), "frames": table.num_rows}
                index.append(group)
                yield table

    def _runs(self, batch: CompressedFrames) -> Iterator[tuple[tuple[str, int], pa.Table]]:
        """The consecutive frames of each medium in a batch: sample and medium, and their rows."""
        columns: dict[str, Any] = {}
        for name in ("sample_id", "media_index", "frame_index", "timestamp_s"):
            columns[name] = pa.array([getattr(frame, name) for frame in batch.frames], self.schema.field(name).type)
        for name, joined in (("keys", batch.cache.keys), ("values", batch.cache.values)):
            numbers, scales = quantise(split_frames(joined, len(joined[0, 0]) // len(batch.frames)), self.stored)
            columns[name] = to_column(numbers)
            if scales is not None:
                columns[f"{name}_scales"] = to_column(scales)
        table = pa.Table.from_arrays([columns[field.name] for field in self.schema], schema=self.schema)
        start = 0
        for medium, run in itertools.groupby(batch.frames, key=lambda frame: (frame.sample_id, frame.media_index)):
            count = len(list(run))
            yield medium, table.slice(start, count)
            start += count


class FrameWorker:
    """Writes the caches of one unit's videos and images, in the order of the work list.

    `threads` threads read and decode ahead of the forward passes, and another quantises and writes behind them. The file is the
    same for any number of threads. Images that `features` has are not decoded and not encoded again.
    """

    def __init__(
        self, output: str, checkpoint: str, block: dict[str, Any], threads: int = 1, features: str | None = None
    ) -> None:
        self.output, self.threads = output, threads
        self.features = None if features is None else FeatureStore(features)
        self.block = FrameCache.model_validate(block)
        self.model = weights.load_compressor(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
        assert self.model.tower is not None
        self.preprocess = self.model.tower.preprocess
        if not self.model.layout.rule.views_apart:
            raise ValueError(f"{checkpoint}: a checkpoint of method {self.model.layout.method} makes no frame caches")
        black = self.model.compress(torch.zeros(1, self.model.tower.size, self.model.tower.size, 3, dtype=torch.uint8))
        stored = black.keys.dtype if self.block.dtype is None else STORED[self.block.dtype]
        self.writer = CacheWriter(black, self.model.language_model.config.rope_parameters, stored)

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        """Write the caches of one unit, given as rows of ROW_ADDRESS. Returns the unit's record."""
        index: list[dict[str, Any]] = []
        rejects: list[Reject] = []
        uri = part_uri(self.output, "frame_cache", unit)
        rows = read_at(listed.to_pylist(), COLUMNS, media=True)
        with closing(flat_map_ahead(self._decode, rows, self.threads, DECODED_BATCHES * self.block.batch)) as decoded:
            batches = self._compress(_accepted(decoded, rejects))
            entry = consume_behind(lambda ahead: self.writer.write(uri, ahead, index), batches, UNWRITTEN_BATCHES)
        rejects_table = pa.Table.from_pylist(rejects, schema=schemas.REJECTS)
        rejects_entry = parquet.write_table(part_uri(self.output, "rejects", unit), [rejects_table], schemas.REJECTS)
        rejected_ids = {reject["source"] for reject in rejects}  # the index leaves out their frames before the error
        location = {"file": entry["path"], "part_bytes": entry["bytes"]}
        index = [{**group, **location} for group in index if group["sample_id"] not in rejected_ids]
        counts = {"read": listed.num_rows, "written": entry["rows"], "rejected": len(rejects)}
        tables = {"frame_cache": [entry], "rejects": [rejects_entry]}
        record = {"tables": tables, "counts": counts, "index": index, "rejects": rejects, "facts": self.writer.facts}
        return {**record, "bytes_per_frame": self.writer.frame_bytes}

    def _decode(self, row: dict[str, Any]) -> Iterator[Frame | Reject]:
        """Every frame of a sample. It ends at a frame that cannot be decoded, in whose place is a reject."""
        stored = self._stored(row)  # not below: a storage that fails is no damaged image
        try:
            for index, medium in enumerate(row["media"] or []):
                for number, time_s, pixels in self._pixels(medium, row["modality"], stored.get(medium["sha256"])):
                    yield Frame(row["sample_id"], index, number, time_s, pixels)
        except UNDECODABLE as error:
            reason = error.reason if isinstance(error, ImageFault) else "corrupt_media"
            yield {"dataset": row["dataset"], "source": row["sample_id"], "reason": reason, "detail": message_line(error)}

    def _pixels(self, medium: dict[str, Any], modality: str, stored: Tensor | None) -> Iterator[tuple[int, float, Tensor]]:
        """Number, time in seconds and `Frame.pixels` of each frame, a few decoded at a time; an image is one frame at 0 s."""
        if modality == "image":
            yield 0, 0.0, self.preprocess(medium["bytes"]) if stored is None else stored
            return
        video, block = Video(medium["bytes"]), self.block
        numbers = video.at_rate(block.fps) if block.fps is not None else evenly_spaced(video.num_frames, block.frames or 1)
        numbers = thin_evenly(numbers, block.max_frames)
        for start in range(0, len(numbers), DECODED_FRAMES):
            chosen = numbers[start : start + DECODED_FRAMES]
            for number, time_s, frame in zip(chosen, video.times(chosen), video.frames(chosen), strict=True):
                yield number, time_s, self.preprocess(Image.fromarray(frame))

    def _stored(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """Stored features of a row's images, by hash: of tiles those of the complete image, which is the first."""
        if self.features is None or row["modality"] != "image":
            return {}
        features = {sha256: self.features(sha256) for sha256 in images_of(row) if sha256 in self.features}
        return {sha256: views[0] if views.dim() == 3 else views for sha256, views in features.items()}

    def _compress(self, frames: Iterator[Frame]) -> Iterator[CompressedFrames]:
        """One pass compresses several frames, of any media: no frame sees another."""
        for size in batch_sizes(self.block.batch):
            batch = list(itertools.islice(frames, size))
            if not batch:
                return
            cache = self._cache([frame.pixels for frame in batch])
            yield CompressedFrames([frame._replace(pixels=torch.empty(0)) for frame in batch], cache)

    def _cache(self, views: list[Tensor]) -> VocoCache:
        """The joined cache of views, each given as its pixels or its features."""
        pixels = [view for view in views if view.dtype == torch.uint8]
        if len(pixels) == len(views):
            return self.model.compress(torch.stack(pixels))
        encoded = iter(self.model.encode_pixels(torch.stack(pixels)).cpu() if pixels else ())
        features = [next(encoded) if view.dtype == torch.uint8 else view for view in views]
        (cache,) = self.model.compress_features([features])
        return cache


def check_stored_features(features: str | None, checkpoint: str) -> None:
    """Refuse features of another tower than that of the compressor which makes the caches that a checkpoint reads."""
    if features is not None:
        uri = compressor_uri(checkpoint) if own_compressor(checkpoint) else checkpoint
        check_tower(FeatureStore(features), weights.read_config(uri)["preprocessing"])


def batch_sizes(batch: int) -> Iterator[int]:
    """Frames of each pass, without end: `batch`, after smaller ones that do not wait until as many frames are decoded."""
    size = min(FIRST_BATCH, batch)
    while True:
        yield size
        size = min(2 * size, batch)


def _accepted(decoded: Iterator[Frame | Reject], rejects: list[Reject]) -> Iterator[Frame]:
    """The frames; adds the rejects among them to `rejects`, in order."""
    for item in decoded:
        if isinstance(item, Frame):
            yield item
        else:
            rejects.append(item)


def cut_rows(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The rows of the tables as tables of `size` rows, the last of what remains. Their columns may have several chunks."""
    pieces: list[pa.Table] = []
    rows = 0
    for table in tables:
        start = 0
        while start < table.num_rows:
            piece = table.slice(start, size - rows)
            pieces.append(piece)
            start, rows = start + piece.num_rows, rows + piece.num_rows
            if rows == size:
                yield pa.concat_tables(pieces)
                pieces, rows = [], 0
    if pieces:
        yield pa.concat_tables(pieces)


def check_method(checkpoint: str) -> None:
    """Refuse a checkpoint that does not compress by <voco> tokens."""
    method = weights.read_config(checkpoint)["layout"]["method"]
    if not METHODS[method].views_apart:
        raise Refused(f"inputs.checkpoint: frame caches need a checkpoint of method voco, got {method}")


def list_media_samples(output: str, samples: list[str], unit_samples: int) -> int:
    """Write the work list of a frame_cache job: every sample that has media, once. Returns the number of units.

    Raises Refused when there is no such sample.
    """
    named = ROW_ADDRESS.append(pa.field("sample_id", pa.string()))
    listed = distinct_rows(row_addresses(samples, with_media=True), "sample_id", named)
    count = units.write_work_list(output, units.cut_units(listed, unit_samples, ROW_ADDRESS), ROW_ADDRESS)
    if count == 0:
        raise Refused("inputs.samples: no rows with images or videos")
    return count


def check_rejects(output: str, records: Iterable[dict[str, Any]], max_share: float) -> None:
    """Raise JobFailed when more than `max_share` of the samples were rejected.

    The records of units with rejects are deleted, so that those units run when the job is submitted again.
    """
    read, rejected = (sum(record["counts"][key] for record in records) for key in ("read", "rejected"))
    if rejected <= max_share * read:
        return
    first = next(reject for record in records for reject in record["rejects"])
    forget_units(output, {record["unit"] for record in records if record["rejects"]})
    raise JobFailed(
        f"frame_cache.max_reject_share: {rejected} of {read} samples cannot be decoded, more than {max_share:.2%}; "
        f"{output}/rejects lists each with its error; the first is {first['source']}: {first['detail']}"
    )


def write_index(output: str, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write `index.parquet`, which says in which row groups of which file a sample's frames are. Returns its manifest entry."""
    rows = (pa.Table.from_pylist(record["index"], schema=schemas.FRAME_INDEX) for record in records)
    rejected = [reject["source"] for record in records for reject in record["rejects"]]
    metadata = {schemas.FRAME_CACHE_METADATA: next(iter(records))["facts"], schemas.REJECTED_METADATA: json.dumps(rejected)}
    return index.write_table_index(output, rows, schemas.FRAME_INDEX, metadata)


def manifest_fields(index: dict[str, Any], records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts, tables and statistics of the job's manifest; `index` is the entry that `write_index` returned."""
    read, frames, rejected = (sum(record["counts"][key] for record in records) for key in ("read", "written", "rejected"))
    tables = {name: [entry for record in records for entry in record["tables"][name]] for name in ("frame_cache", "rejects")}
    stored = sum(entry["bytes"] for entry in tables["frame_cache"])
    return {
        "counts": {"read": read, "written": frames, "rejected": {"corrupt_media": rejected} if rejected else {}},
        "tables": {**tables, "index": [index]},
        "statistics": {
            "bytes_per_frame": next(iter(records))["bytes_per_frame"],
            "stored_bytes_per_frame": stored / max(1, frames),
        },
    }
