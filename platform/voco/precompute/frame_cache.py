"""The `frame_cache` job: decodes frames, compresses each alone with the checkpoint's compressor, writes `frame_cache/`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
from voco.precompute.frame_tensors import cache_metadata, tensor_to_bytes
from voco.precompute.pixel_loader import UNDECODABLE
from voco.run import units
from voco.run.units import part_uri
from voco.store import parquet, schemas, storage
from voco.store.samples import ROW_ADDRESS, read_at, row_addresses
from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced, thin_evenly

COLUMNS = ["sample_id", "dataset", "modality", "media"]


class Frame(NamedTuple):
    """One decoded frame, and the medium that it is from."""

    sample_id: str
    media_index: int
    frame_index: int  # number in the video
    timestamp_s: float
    pixels: Tensor  # (S, S, 3) uint8, as the tower's `preprocess` makes them


class FrameWorker:
    """Writes the caches of one unit's videos and images, in the order of the work list."""

    def __init__(self, output: str, checkpoint: str, block: dict[str, Any]) -> None:
        self.output = output
        self.block = FrameCache.model_validate(block)
        self.model = weights.load_compressor(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
        assert self.model.tower is not None
        self.preprocess = self.model.tower.preprocess
        if not self.model.layout.rule.views_apart:
            raise ValueError(f"{checkpoint}: a checkpoint of method {self.model.layout.method} makes no frame caches")

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        """Write the caches of one unit, given as rows of ROW_ADDRESS. Returns the unit's record."""
        index: list[dict[str, Any]] = []
        rejects: list[dict[str, str]] = []
        assert self.model.tower is not None
        black = self.model.compress(torch.zeros(1, self.model.tower.size, self.model.tower.size, 3, dtype=torch.uint8))
        facts = cache_metadata(black, self.model.language_model.config.rope_parameters)
        tensor_bytes = black.keys.numel() * black.keys.element_size()
        schema = schemas.frame_cache_schema(tensor_bytes)
        groups = self._groups(self._rows(self._frames(listed, rejects)), schema, tensor_bytes, index)
        uri = part_uri(self.output, "frame_cache", unit)
        entry = parquet.write_table(uri, groups, schema, {schemas.FRAME_CACHE_METADATA: facts})
        rejects_table = pa.Table.from_pylist(rejects, schema=schemas.REJECTS)
        rejects_entry = parquet.write_table(part_uri(self.output, "rejects", unit), [rejects_table], schemas.REJECTS)
        rejected_ids = {reject["source"] for reject in rejects}  # the index leaves out their frames before the error
        index = [{**group, "file": entry["path"]} for group in index if group["sample_id"] not in rejected_ids]
        counts = {"read": listed.num_rows, "written": entry["rows"], "rejected": len(rejects)}
        tables = {"frame_cache": [entry], "rejects": [rejects_entry]}
        return {"tables": tables, "counts": counts, "index": index, "rejects": rejects, "bytes_per_frame": 2 * tensor_bytes}

    def _frames(self, listed: pa.Table, rejects: list[dict[str, str]]) -> Iterator[Frame]:
        """Every frame of the unit, decoded. A sample ends at a frame that cannot be decoded, and is added to `rejects`."""
        for row in read_at(listed.to_pylist(), COLUMNS, media=True):
            try:
                for index, medium in enumerate(row["media"] or []):
                    for number, time_s, pixels in self._pixels(medium, row["modality"]):
                        yield Frame(row["sample_id"], index, number, time_s, pixels)
            except UNDECODABLE as error:
                reason = error.reason if isinstance(error, ImageFault) else "corrupt_media"
                reject = {"dataset": row["dataset"], "source": row["sample_id"], "reason": reason}
                rejects.append({**reject, "detail": message_line(error)})

    def _pixels(self, medium: dict[str, Any], modality: str) -> Iterator[tuple[int, float, Tensor]]:
        """Number, time in seconds and (S, S, 3) pixels of each frame, decoded `batch` at a time; an image is one frame at 0 s."""
        if modality == "image":
            yield 0, 0.0, self.preprocess(medium["bytes"])
            return
        video, block = Video(medium["bytes"]), self.block
        numbers = video.at_rate(block.fps) if block.fps is not None else evenly_spaced(video.num_frames, block.frames or 1)
        numbers = thin_evenly(numbers, block.max_frames)
        for start in range(0, len(numbers), block.batch):
            batch = numbers[start : start + block.batch]
            for number, time_s, frame in zip(batch, video.times(batch), video.frames(batch), strict=True):
                yield number, time_s, self.preprocess(Image.fromarray(frame))

    def _rows(self, frames: Iterator[Frame]) -> Iterator[dict[str, Any]]:
        """Rows of the table. One pass compresses `batch` frames, of any media: no frame sees another."""
        while batch := list(itertools.islice(frames, self.block.batch)):
            cache = self.model.compress(torch.stack([frame.pixels for frame in batch]))
            split = [torch.split(tensor, cache.key.n, dim=2) for tensor in (cache.keys, cache.values)]
            for frame, keys, values in zip(batch, *split, strict=True):
                names = {"sample_id": frame.sample_id, "media_index": frame.media_index}
                times = {"frame_index": frame.frame_index, "timestamp_s": frame.timestamp_s}
                yield {**names, **times, "keys": tensor_to_bytes(keys), "values": tensor_to_bytes(values)}

    def _groups(
        self, rows: Iterator[dict[str, Any]], schema: pa.Schema, tensor_bytes: int, index: list[dict[str, Any]]
    ) -> Iterator[pa.Table]:
        """Row groups of one medium each, of at most FRAME_GROUP_BYTES. Adds each to `index`."""
        size = max(1, schemas.FRAME_GROUP_BYTES // (2 * tensor_bytes))
        groups = 0
        for (sample_id, medium), frames in itertools.groupby(rows, key=lambda row: (row["sample_id"], row["media_index"])):
            while group := list(itertools.islice(frames, size)):
                index.append({"sample_id": sample_id, "media_index": medium, "row_group": groups, "frames": len(group)})
                groups += 1
                yield pa.Table.from_pylist(group, schema=schema)


def check_method(checkpoint: str) -> None:
    """Refuse a checkpoint that does not compress by <voco> tokens."""
    method = weights.read_config(checkpoint)["layout"]["method"]
    if not METHODS[method].views_apart:
        raise Refused(f"inputs.checkpoint: frame caches need a checkpoint of method voco, got {method}")


def list_media_samples(output: str, samples: list[str], unit_samples: int) -> int:
    """Write the work list of a frame_cache job: every sample that has media, once. Returns the number of units.

    Raises Refused when there is no such sample.
    """
    listed = _distinct(row_addresses(samples, with_media=True))
    count = units.write_work_list(output, units.cut_units(listed, unit_samples, ROW_ADDRESS), ROW_ADDRESS)
    if count == 0:
        raise Refused("inputs.samples: no rows with images or videos")
    return count


def _distinct(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    sample_ids: set[str] = set()
    for row in rows:
        if row["sample_id"] not in sample_ids:
            sample_ids.add(row["sample_id"])
            yield row


def check_rejects(output: str, records: list[dict[str, Any]], max_share: float) -> None:
    """Raise JobFailed when more than `max_share` of the samples were rejected.

    The records of units with rejects are deleted, so that those units run when the job is submitted again.
    """
    read, rejected = (sum(record["counts"][key] for record in records) for key in ("read", "rejected"))
    if rejected <= max_share * read:
        return
    first = next(reject for record in records for reject in record["rejects"])
    for record in records:
        if record["rejects"]:
            storage.delete(units.unit_record_uri(output, record["unit"]))
    raise JobFailed(
        f"frame_cache.max_reject_share: {rejected} of {read} samples cannot be decoded, more than {max_share:.2%}; "
        f"{output}/rejects lists each with its error; the first is {first['source']}: {first['detail']}"
    )


def write_index(output: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write `index.parquet`, which says in which row groups of which file a sample's frames are. Returns its manifest entry."""
    index = pa.Table.from_pylist([group for record in records for group in record["index"]], schema=schemas.FRAME_INDEX)
    return parquet.write_table(storage.join(output, schemas.FRAME_INDEX_FILE), [index], schemas.FRAME_INDEX)


def manifest_fields(index: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, tables and statistics of the job's manifest; `index` is the entry that `write_index` returned."""
    read, frames, rejected = (sum(record["counts"][key] for record in records) for key in ("read", "written", "rejected"))
    tables = {name: [entry for record in records for entry in record["tables"][name]] for name in ("frame_cache", "rejects")}
    stored = sum(entry["bytes"] for entry in tables["frame_cache"])
    return {
        "counts": {"read": read, "written": frames, "rejected": {"corrupt_media": rejected} if rejected else {}},
        "tables": {**tables, "index": [index]},
        "statistics": {
            "bytes_per_frame": records[0]["bytes_per_frame"],
            "stored_bytes_per_frame": stored / max(1, frames),
        },
    }
