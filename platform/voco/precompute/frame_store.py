"""Reads frame caches by sample: row groups on demand, never a complete file (an hour at 7B and N=2 is 3.5 GiB)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
import pyarrow as pa

from voco.errors import Refused
from voco.model.cache import CacheKey
from voco.precompute.frame_tensors import DTYPES, tensor_columns
from voco.precompute.stored_frames import StoredFrames, stored_tensors
from voco.sequence.sequence import Layout
from voco.store import index, schemas, storage
from voco.store.part_files import PartFiles
from voco.store.row_group_cache import LIMIT_BYTES, RowGroupCache
from voco.video.sample_frames import thin_evenly


class FrameStore:
    """Caches of the media of each sample. Opening reads the index and no part. Row groups stay in memory up to `limit` bytes.
    Thread-safe.

    Raises Refused for an output without an index or without caches.
    """

    def __init__(self, uri: str, limit: int = LIMIT_BYTES) -> None:
        self.uri = uri
        table = index.read_table_index(uri, schemas.FRAME_INDEX)
        facts = index.facts_of(table, schemas.FRAME_CACHE_METADATA)
        if facts is None:
            raise Refused(f"inputs.frame_cache: {uri} has no frame of any sample; make caches of the samples that this job reads")
        self.facts: dict[str, Any] = facts  # `cache_metadata` of every file
        self.rejected = set(index.facts_of(table, schemas.REJECTED_METADATA) or [])  # samples without a cache
        sample_ids = index.fixed_width(table["sample_id"])
        starts = np.flatnonzero(np.r_[True, sample_ids[1:] != sample_ids[:-1]]) if len(sample_ids) else np.zeros(0, np.int64)
        self._samples = index.Keys(sample_ids[starts])  # the row groups of a sample follow each other
        order = self._samples.take_order()
        self._starts, self._stops = starts[order], np.append(starts[1:], len(sample_ids))[order]
        files = table["file"].combine_chunks().dictionary_encode()
        self._names: list[str] = files.dictionary.to_pylist()
        self._file, self._group = files.indices.to_numpy(), table["row_group"].to_numpy()
        self._frames, self._bytes = table["frames"].to_numpy(), table["part_bytes"].to_numpy()
        self._files = PartFiles()
        self._tables: RowGroupCache[int] = RowGroupCache(self._read_group, limit)

    @property
    def key(self) -> CacheKey:
        return CacheKey.from_description(self.facts)

    def __contains__(self, sample_id: str) -> bool:
        return self._samples.position(sample_id.encode()) is not None

    def __len__(self) -> int:
        """Samples that have a cache."""
        return len(self._samples)

    @property
    def most_frames(self) -> int:
        """Frames of the sample that has most of them."""
        total = np.cumsum(np.append(0, self._frames))
        return int((total[self._stops] - total[self._starts]).max(initial=0))

    def frames(self, sample_id: str) -> int:
        """The number of cached frames of a sample. Raises KeyError for a sample that is not in the store."""
        return int(self._frames[self._rows(sample_id)].sum())

    def select_frames(self, sample_id: str, limit: int) -> list[int]:
        """Offsets of the frames to read, in the sample's order: all, or `limit` of them evenly."""
        return thin_evenly(list(range(self.frames(sample_id))), limit)

    def read(self, sample_id: str, offsets: Sequence[int], n: int | None = None) -> StoredFrames:
        """The cache of a sample's frames at `offsets`, in that order; `n` rows of each (default: all N). It is in memory, or in
        mapped files whose pages are.
        """
        rows = self._rows(sample_id)
        ends = np.cumsum(self._frames[rows])
        first = ends - self._frames[rows]  # offset of each group's first frame
        group_of = [int(group) for group in np.searchsorted(ends, np.asarray(offsets), side="right")]
        tables = self._tables.load(rows.start + group for group in group_of)  # more than `limit` are not read twice
        groups: list[tuple[pa.Table, list[int]]] = []
        for group, run in groupby(zip(group_of, offsets, strict=True), key=lambda pair: pair[0]):
            groups.append((tables[rows.start + group], [offset - int(first[group]) for _, offset in run]))
        keys, values = (
            tuple(chain.from_iterable(stored_tensors(table, group_rows, name, self.facts) for table, group_rows in groups))
            for name in ("keys", "values")
        )
        for part in (*keys, *values):
            part.touch()
        tokens = self.facts["shape"][2]
        frames = StoredFrames(keys, values, (tokens,) * len(offsets), self.key, DTYPES[self.facts["model_dtype"]])
        return frames if n is None or n == tokens else frames.take(n)

    def _rows(self, sample_id: str) -> slice:
        """The rows of the index that are a sample's. Raises KeyError."""
        position = self._samples.position(sample_id.encode())
        if position is None:
            raise KeyError(f"no frame caches for sample {sample_id}; the frame_cache job must read the same samples")
        return slice(int(self._starts[position]), int(self._stops[position]))

    def _read_group(self, row: int) -> pa.Table:
        """Keys and values of the row group in a row of the index."""
        uri = storage.join(self.uri, "frame_cache", self._names[self._file[row]])
        group, size = int(self._group[row]), int(self._bytes[row])
        return self._files.read_values(uri, group, tensor_columns(self.facts), size)


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
