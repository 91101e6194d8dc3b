"""Reads frame caches by sample: row groups on demand, never a complete file (an hour at 7B and N=2 is 3.5 GiB)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from voco.errors import Refused
from voco.model.cache import CacheKey, VocoCache
from voco.precompute.frame_tensors import tensor_from_bytes
from voco.sequence.sequence import Layout
from voco.store import parquet, schemas, storage
from voco.store.row_group_cache import LIMIT_BYTES, RowGroupCache
from voco.video.sample_frames import thin_evenly


class FrameStore:
    """Caches of the media of each sample. Row groups stay in memory up to `limit` bytes."""

    def __init__(self, uri: str, limit: int = LIMIT_BYTES) -> None:
        self.uri = uri
        self.groups: dict[str, list[tuple[str, int, int]]] = {}  # sample -> (file, row group, frames), media in order
        folder = storage.join(uri, "rejects")
        rejects = [parquet.read_table(storage.join(folder, name), ["source"]) for name in storage.list_names(folder)]
        self.rejected = {source for table in rejects for source in table["source"].to_pylist()}  # samples without a cache
        for entry in parquet.read_table(storage.join(uri, schemas.FRAME_INDEX_FILE)).to_pylist():
            self.groups.setdefault(entry["sample_id"], []).append((entry["file"], entry["row_group"], entry["frames"]))
        self.files: dict[str, pq.ParquetFile] = {}
        self.tables: RowGroupCache[str] = RowGroupCache(self._read_group, limit)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The files' metadata (`cache_metadata`). Raises Refused when there are no files, or caches of several compressors."""
        names = storage.list_names(storage.join(self.uri, "frame_cache"))
        if not names:
            raise Refused(f"inputs.frame_cache: {self.uri} has no frame caches")
        metadata = {self._file(name).schema_arrow.metadata[schemas.FRAME_CACHE_METADATA.encode()] for name in names}
        if len(metadata) > 1:
            raise Refused(f"inputs.frame_cache: {self.uri} has caches of {len(metadata)} compressors")
        facts: dict[str, Any] = json.loads(metadata.pop())
        return facts

    @property
    def key(self) -> CacheKey:
        return CacheKey.from_description(self.facts)

    def frames(self, sample_id: str) -> int:
        """The number of cached frames of a sample. Raises KeyError for a sample that is not in the store."""
        if sample_id not in self.groups:
            raise KeyError(f"no frame caches for sample {sample_id}; the frame_cache job must read the same samples")
        return sum(frames for _, _, frames in self.groups[sample_id])

    def select_frames(self, sample_id: str, limit: int) -> list[int]:
        """Offsets of the frames to read, in the sample's order: all, or `limit` of them evenly."""
        return thin_evenly(list(range(self.frames(sample_id))), limit)

    def read(self, sample_id: str, offsets: Sequence[int], n: int | None = None) -> VocoCache:
        """The joined cache of a sample's frames at `offsets`, in that order; `n` rows of each (default: all N)."""
        facts = self.facts
        frames: dict[int, tuple[bytes, bytes]] = {}
        requested, start = set(offsets), 0
        for file, group, count in self.groups[sample_id]:
            in_group = [offset for offset in range(start, start + count) if offset in requested]
            if in_group:
                table = self.tables.get(file, group)
                for offset in in_group:
                    frames[offset] = (table["keys"][offset - start].as_py(), table["values"][offset - start].as_py())
            start += count
        keys = tensor_from_bytes([frames[offset][0] for offset in offsets], facts)  # (F, D, H, N, E)
        values = tensor_from_bytes([frames[offset][1] for offset in offsets], facts)
        tokens = facts["shape"][2]
        joined = [torch.cat(list(tensor), dim=2) for tensor in (keys, values)]
        cache = VocoCache(joined[0], joined[1], (tokens,) * len(offsets), self.key)
        return cache if n is None or n == tokens else cache.take(n)

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self.files:
            self.files[name] = parquet.open_parquet(storage.join(self.uri, "frame_cache", name))
        return self.files[name]

    def _read_group(self, file: str, group: int) -> pa.Table:
        return self._file(file).read_row_group(group, columns=["keys", "values"]).combine_chunks()


def check_compressor(store: FrameStore, config: dict[str, Any], n: int) -> None:
    """Refuse caches that a checkpoint of this configuration cannot read: another compressor or preprocessing, or N < n."""
    layout = Layout(**config["layout"])
    expected = {
        "compressor": config["compressor"],
        "prefix_ids": layout.prefix_ids,
        "preprocessing": config["preprocessing"],
    }
    for name, value in expected.items():
        cached = getattr(store.key, name)
        if cached != value:
            raise Refused(
                f"inputs.frame_cache: {store.uri} was made with {name} {str(cached)[:12]}, the checkpoint reads {str(value)[:12]}"
            )
    if n > store.facts["shape"][2]:
        raise Refused(f"compression.tokens: expected at most the {store.facts['shape'][2]} tokens of each cached frame, got {n}")
