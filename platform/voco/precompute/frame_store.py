"""Reads frame caches by sample: row groups on demand, never a whole file (an hour at 7B and N=2 is 3.5 GiB)."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from voco.errors import Refused
from voco.model.cache import CacheKey, VocoCache
from voco.precompute.frame_cache import tensor_from_bytes
from voco.sequence.sequence import Layout
from voco.store import parquet, storage
from voco.video.sample_frames import thin_evenly


class FrameStore:
    """Caches of the media of each sample. The latest row groups stay in memory up to `limit` bytes."""

    def __init__(self, uri: str, limit: int = 1 << 30) -> None:
        self.uri = uri
        self.groups: dict[str, list[tuple[str, int, int]]] = {}  # sample -> (file, row group, frames), media in order
        folder = storage.join(uri, "rejects")
        lost = [parquet.read_table(storage.join(folder, name), ["source"]) for name in storage.list_names(folder)]
        self.rejected = {source for table in lost for source in table["source"].to_pylist()}  # samples without a cache
        for line in parquet.read_table(storage.join(uri, "index.parquet")).to_pylist():
            self.groups.setdefault(line["sample_id"], []).append((line["file"], line["row_group"], line["frames"]))
        self.files: dict[str, pq.ParquetFile] = {}
        self.held: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self.limit, self.held_bytes = limit, 0

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the files say of themselves: their maker (`CacheKey.stated`) and the shape of a frame's keys."""
        names = storage.list_names(storage.join(self.uri, "frame_cache"))
        if not names:
            raise Refused(f"inputs.frame_cache: {self.uri} holds no frame caches")
        stated = {self._file(name).schema_arrow.metadata[b"voco.frame_cache"] for name in names}
        if len(stated) > 1:
            raise Refused(f"inputs.frame_cache: {self.uri} holds caches of {len(stated)} compressors")
        facts: dict[str, Any] = json.loads(stated.pop())
        return facts

    @property
    def key(self) -> CacheKey:
        return CacheKey.of(self.facts)

    def frames(self, sample_id: str) -> int:
        """Frames that are cached for a sample. Raises KeyError for a sample that is not in the store."""
        if sample_id not in self.groups:
            raise KeyError(f"no frame caches for sample {sample_id}; the frame_cache job must read the same samples")
        return sum(frames for _, _, frames in self.groups[sample_id])

    def taken(self, sample_id: str, limit: int) -> list[int]:
        """Which of a sample's frames are read, as places in its order: all, or `limit` of them evenly."""
        return thin_evenly(list(range(self.frames(sample_id))), limit)

    def read(self, sample_id: str, places: Sequence[int], n: int | None = None) -> VocoCache:
        """The joined cache of some frames of a sample, in the order given; `n` rows of each (default: all N)."""
        facts = self.facts
        found: dict[int, tuple[bytes, bytes]] = {}
        wanted, start = set(places), 0
        for file, group, frames in self.groups[sample_id]:
            mine = [place for place in range(start, start + frames) if place in wanted]
            if mine:
                table = self._group(file, group)
                for place in mine:
                    found[place] = (table["keys"][place - start].as_py(), table["values"][place - start].as_py())
            start += frames
        pairs = [found[place] for place in places]
        keys = tensor_from_bytes([pair[0] for pair in pairs], facts)  # (F, D, H, N, E)
        values = tensor_from_bytes([pair[1] for pair in pairs], facts)
        each = facts["shape"][2]
        joined = [torch.cat(list(tensor), dim=2) for tensor in (keys, values)]
        cache = VocoCache(joined[0], joined[1], (each,) * len(places), self.key)
        return cache if n is None or n == each else cache.take(n)

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self.files:
            self.files[name] = parquet.open_parquet(storage.join(self.uri, "frame_cache", name))
        return self.files[name]

    def _group(self, file: str, group: int) -> pa.Table:
        where = (file, group)
        if where not in self.held:
            table = self._file(file).read_row_group(group, columns=["keys", "values"]).combine_chunks()
            self.held[where] = table
            self.held_bytes += table.nbytes
            while self.held_bytes > self.limit and len(self.held) > 1:
                self.held_bytes -= self.held.popitem(last=False)[1].nbytes
        self.held.move_to_end(where)
        return self.held[where]


def check_compressor(store: FrameStore, config: dict[str, Any], n: int) -> None:
    """Refuse caches that a checkpoint of this configuration cannot read: another maker, or N < n."""
    mine = Layout(**config["layout"])
    bos = () if mine.bos_id is None else (mine.bos_id,)
    wanted = {
        "compressor": config["compressor"],
        "prefix_ids": bos + mine.separator_ids,
        "preprocessing": config["preprocessing"],
    }
    for name, value in wanted.items():
        made = getattr(store.key, name)
        if made != value:
            short = [str(one)[:12] for one in (made, value)]
            raise Refused(f"inputs.frame_cache: {store.uri} was made with {name} {short[0]}, the checkpoint reads {short[1]}")
    if n > store.facts["shape"][2]:
        raise Refused(f"compression.tokens: expected at most the {store.facts['shape'][2]} tokens of each cached frame, got {n}")
