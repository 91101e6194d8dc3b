"""Frames to caches: decode, compress each alone with the checkpoint's compressor, write `frame_cache/` (design section 4)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from voco import rows, work
from voco.blocks import FrameCache
from voco.model import weights
from voco.model.cache import CacheKey, VocoCache
from voco.video.decode import Video
from voco.video.sample_frames import at_rate, evenly, thin
from voco.work import part

COLUMNS = ["sample_id", "modality", "media"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def describe(cache: VocoCache, rope: dict[str, Any]) -> str:
    """What `frame_cache/` files say of themselves, as JSON: all that must match before they are read."""
    layers, heads, tokens, width = cache.keys.shape
    each = tokens // len(cache.tokens)
    facts = {
        "dtype": str(cache.keys.dtype).removeprefix("torch."),
        "shape": [layers, heads, each, width],
        "compressor": cache.key.compressor,
        "n": cache.key.n,
        "prefix_ids": list(cache.key.prefix_ids),
        "preprocessing": cache.key.preprocessing,
        "rope": rope,
    }
    return json.dumps(facts, sort_keys=True)


def key_of(facts: dict[str, Any]) -> CacheKey:
    return CacheKey(facts["compressor"], "voco", facts["n"], tuple(facts["prefix_ids"]), facts["preprocessing"])


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def from_bytes(data: list[bytes], facts: dict[str, Any]) -> Tensor:
    """(F, D, H, N, E) of F frames' keys or values."""
    flat = torch.from_numpy(np.frombuffer(b"".join(data), dtype=np.uint8).copy())
    return flat.view(DTYPES[facts["dtype"]]).view(len(data), *facts["shape"])


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
        place = part(self.output, "frame_cache", unit)
        index: list[dict[str, Any]] = []
        bad: list[str] = []
        sample = self._compress(torch.zeros(1, 3, self.model.tower.size, self.model.tower.size))  # type: ignore[union-attr]
        facts = describe(sample, self.model.language_model.config.rope_parameters)
        each = sample.keys.numel() * sample.keys.element_size()
        schema = rows.frame_cache(each)
        entry = rows.write_table(place, self._groups(listed, schema, each, index, bad), schema, {"voco.frame_cache": facts})
        for line in index:
            line["file"] = entry["path"]
        counts = {"read": listed.num_rows, "written": entry["rows"], "bad": len(bad)}
        return {"tables": {"frame_cache": [entry]}, "counts": counts, "index": index, "bad": bad, "bytes_per_frame": 2 * each}

    def _groups(
        self, listed: pa.Table, schema: pa.Schema, each: int, index: list[dict[str, Any]], bad: list[str]
    ) -> Iterator[pa.Table]:
        """Row groups of one medium each, at most 16 MiB; fills `index` and `bad` on the way."""
        size = max(1, rows.FRAME_GROUP_BYTES // (2 * each))
        for row in read_media(listed.to_pylist()):
            for medium, one in enumerate(row["media"] or []):
                try:
                    numbers, times, pixels = self.pixels(one, row["modality"])
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    bad.append(f"{row['sample_id']}: {error}")
                    continue
                for start in range(0, len(numbers), size):
                    some = slice(start, start + size)
                    columns = self._columns(pixels[some])
                    held = len(numbers[some])
                    index.append({"sample_id": row["sample_id"], "media_index": medium, "row_group": len(index), "frames": held})
                    yield pa.table(
                        [
                            pa.array([row["sample_id"]] * held),
                            pa.array([medium] * held, pa.int32()),
                            pa.array(numbers[some], pa.int64()),
                            pa.array(times[some], pa.float64()),
                            *(pa.array(column, schema.field("keys").type) for column in columns),
                        ],
                        schema=schema,
                    )

    def pixels(self, medium: dict[str, Any], modality: str) -> tuple[list[int], list[float], Any]:
        """Frame numbers, their times in seconds, and (F, 3, S, S) pixels of one medium; an image is one frame at 0 s."""
        if modality == "image":
            return [0], [0.0], self.preprocess(medium["bytes"])[None]
        video = Video(medium["bytes"])
        block = self.block
        if block.fps is not None:
            numbers = at_rate(video.num_frames, video.fps, block.fps)
        else:
            numbers = evenly(video.num_frames, block.frames or 1)
        numbers = thin(numbers, block.max_frames)
        made = [self.preprocess(Image.fromarray(frame)) for frame in video.frames(numbers)]
        return numbers, [number / video.fps for number in numbers], torch.stack(made)

    def _columns(self, pixels: Tensor) -> tuple[list[bytes], list[bytes]]:
        """Keys and values of each frame, as bytes."""
        keys: list[bytes] = []
        values: list[bytes] = []
        for start in range(0, len(pixels), self.block.batch):
            cache = self._compress(pixels[start : start + self.block.batch])
            n = cache.key.n
            keys += [to_bytes(one) for one in torch.split(cache.keys, n, dim=2)]
            values += [to_bytes(one) for one in torch.split(cache.values, n, dim=2)]
        return keys, values

    def _compress(self, pixels: Tensor) -> VocoCache:
        return self.model.compress(pixels)


def read_media(wanted: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of `samples/` with their media's bytes, in the order of the list (rows of `work.SAMPLE_LIST`)."""
    held: tuple[tuple[str, int], list[dict[str, Any]]] | None = None
    for one in wanted:
        where = (one["part"], one["group"])
        if held is None or held[0] != where:
            with rows.open_parquet(one["part"]) as file:
                held = (where, file.read_row_group(one["group"], columns=COLUMNS).to_pylist())
        yield held[1][one["row"]]


def write_list(output: str, samples: list[str], unit_samples: int) -> int:
    """The work list of a frame_cache job: every row of the tables that has media. Returns the number of units."""
    listed = work.sample_rows(samples, with_media=True)
    return work.write_list(output, work.cut(listed, unit_samples, work.SAMPLE_LIST), work.SAMPLE_LIST)
