"""Frames to caches: decode, compress each alone with the checkpoint's compressor, write `frame_cache/` (design section 4)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from voco.job.config import FrameCache
from voco.model import weights
from voco.model.cache import VocoCache
from voco.run import units
from voco.run.units import part_uri
from voco.store import parquet, schemas
from voco.store.samples import ROW_ADDRESS, list_rows
from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced, frames_at_rate, thin_evenly

COLUMNS = ["sample_id", "dataset", "modality", "media"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def cache_metadata(cache: VocoCache, rope: dict[str, Any]) -> str:
    """What `frame_cache/` files say of themselves, as JSON: all that must match before they are read."""
    layers, heads, tokens, width = cache.keys.shape
    each = tokens // len(cache.tokens)
    facts = {**cache.key.stated(cache.keys.dtype, rope), "shape": [layers, heads, each, width]}
    return json.dumps(facts, sort_keys=True)


def tensor_to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def tensor_from_bytes(data: list[bytes], facts: dict[str, Any]) -> Tensor:
    """(F, D, H, N, E) of F frames' keys or values."""
    flat = torch.from_numpy(np.frombuffer(b"".join(data), dtype=np.uint8).copy())
    return flat.view(DTYPES[facts["dtype"]]).view(len(data), *facts["shape"])


class Frame(NamedTuple):
    """One decoded frame and whose it is."""

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
        if self.model.layout.method != "voco":
            raise ValueError(f"{checkpoint}: a checkpoint of method {self.model.layout.method} makes no frame caches")

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        place = part_uri(self.output, "frame_cache", unit)
        index: list[dict[str, Any]] = []
        rejects: list[dict[str, str]] = []
        assert self.model.tower is not None
        sample = self.model.compress(torch.zeros(1, self.model.tower.size, self.model.tower.size, 3, dtype=torch.uint8))
        facts = cache_metadata(sample, self.model.language_model.config.rope_parameters)
        each = sample.keys.numel() * sample.keys.element_size()
        schema = schemas.frame_cache_schema(each)
        groups = self._groups(self._cached(self._frames(listed, rejects)), schema, each, index)
        entry = parquet.write_table(place, groups, schema, {"voco.frame_cache": facts})
        lost = parquet.write_table(
            part_uri(self.output, "rejects", unit), [pa.Table.from_pylist(rejects, schema=schemas.REJECTS)], schemas.REJECTS
        )
        lost_ids = {reject["source"] for reject in rejects}  # what was written of them before the error is in no index
        index = [{**line, "file": entry["path"]} for line in index if line["sample_id"] not in lost_ids]
        counts = {"read": listed.num_rows, "written": entry["rows"], "rejected": len(rejects)}
        tables = {"frame_cache": [entry], "rejects": [lost]}
        return {"tables": tables, "counts": counts, "index": index, "rejects": rejects, "bytes_per_frame": 2 * each}

    def _frames(self, listed: pa.Table, rejects: list[dict[str, str]]) -> Iterator[Frame]:
        """Every frame of the unit, decoded; a sample of which one cannot be decoded ends there and is added to `rejects`."""
        for row in read_media(listed.to_pylist()):
            try:
                for medium, one in enumerate(row["media"] or []):
                    for number, time_s, pixels in self._pixels(one, row["modality"]):
                        yield Frame(row["sample_id"], medium, number, time_s, pixels)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                lost = {"dataset": row["dataset"], "source": row["sample_id"], "reason": "corrupt_media"}
                rejects.append({**lost, "detail": str(error)})

    def _pixels(self, medium: dict[str, Any], modality: str) -> Iterator[tuple[int, float, Tensor]]:
        """Number, time in seconds and (S, S, 3) pixels of each frame, decoded `batch` at a time; an image is one at 0 s."""
        if modality == "image":
            yield 0, 0.0, self.preprocess(medium["bytes"])
            return
        video, block = Video(medium["bytes"]), self.block
        if block.fps is not None:
            numbers = frames_at_rate(video.num_frames, video.fps, block.fps)
        else:
            numbers = evenly_spaced(video.num_frames, block.frames or 1)
        numbers = thin_evenly(numbers, block.max_frames)
        for start in range(0, len(numbers), block.batch):
            some = numbers[start : start + block.batch]
            for number, frame in zip(some, video.frames(some), strict=True):
                yield number, number / video.fps, self.preprocess(Image.fromarray(frame))

    def _cached(self, frames: Iterator[Frame]) -> Iterator[dict[str, Any]]:
        """Rows of the table: `batch` frames are compressed in one pass, whichever media they are of; each sees itself only."""
        while held := list(itertools.islice(frames, self.block.batch)):
            cache = self.model.compress(torch.stack([frame.pixels for frame in held]))
            split = [torch.split(tensor, cache.key.n, dim=2) for tensor in (cache.keys, cache.values)]
            for frame, keys, values in zip(held, *split, strict=True):
                names = {"sample_id": frame.sample_id, "media_index": frame.media_index}
                times = {"frame_index": frame.frame_index, "timestamp_s": frame.timestamp_s}
                yield {**names, **times, "keys": tensor_to_bytes(keys), "values": tensor_to_bytes(values)}

    def _groups(
        self, made: Iterator[dict[str, Any]], schema: pa.Schema, each: int, index: list[dict[str, Any]]
    ) -> Iterator[pa.Table]:
        """Row groups of one medium each, at most 16 MiB; fills `index` on the way."""
        size = max(1, schemas.FRAME_GROUP_BYTES // (2 * each))
        groups = 0
        for (sample_id, medium), frames in itertools.groupby(made, key=lambda row: (row["sample_id"], row["media_index"])):
            while held := list(itertools.islice(frames, size)):
                index.append({"sample_id": sample_id, "media_index": medium, "row_group": groups, "frames": len(held)})
                groups += 1
                yield pa.Table.from_pylist(held, schema=schema)


def read_media(wanted: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of `samples/` with their media's bytes, in the order of the list (rows of `work.SAMPLE_LIST`)."""
    held: tuple[tuple[str, int], list[dict[str, Any]]] | None = None
    for one in wanted:
        where = (one["part"], one["group"])
        if held is None or held[0] != where:
            with parquet.open_parquet(one["part"]) as file:
                held = (where, file.read_row_group(one["group"], columns=COLUMNS).to_pylist())
        row = held[1][one["row"]]
        for medium in row["media"] or []:
            medium["bytes"] = parquet.medium_bytes(medium, one["part"])
        yield row


def list_media_samples(output: str, samples: list[str], unit_samples: int) -> int:
    """The work list of a frame_cache job: every sample of the tables that has media, once. Returns the number of units."""
    seen: set[str] = set()
    listed = (
        row
        for row in list_rows(samples, with_media=True)
        if row["sample_id"] not in seen and not seen.add(row["sample_id"])  # type: ignore[func-returns-value]
    )
    return units.write_work_list(output, units.cut_units(listed, unit_samples, ROW_ADDRESS), ROW_ADDRESS)
