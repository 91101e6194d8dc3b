"""Cached frames as they lie in row groups: copied once, when a batch is made of them.

Legend: F frames, D layers, H key-value heads, N tokens of a frame, E head width, M cached tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from voco.model.cache import CacheKey, VocoCache
from voco.precompute.frame_tensors import DTYPES, dequantise
from voco.store.number_types import SCALED_LIMITS

PAGE_BYTES = 4096  # the smallest page of memory


class StoredTensors(NamedTuple):
    """Keys or values of evenly spaced rows of a row group, in their place in the file."""

    numbers: Tensor  # (F, D, H, N, E) in the stored type
    scales: Tensor | None  # (F, D, H) fp32 of scaled types

    def take(self, n: int) -> StoredTensors:
        return self._replace(numbers=self.numbers[..., :n, :])

    def touch(self) -> None:
        """Bring the numbers into memory: here, on a thread that reads ahead, and not in the step that uses them."""
        rows = self.numbers.flatten(1).view(torch.uint8).numpy()
        rows[:, ::PAGE_BYTES].sum()
        rows[:, -1].sum()

    def copy_to(self, joined: Tensor, dtype: torch.dtype) -> None:
        """Write the numbers, rounded to `dtype`, into (D, H, F * N, E) of any number type and device."""
        layers, heads, _, width = joined.shape
        target = joined.view(layers, heads, len(self.numbers), -1, width).permute(2, 0, 1, 3, 4)
        stored = self.numbers.to(joined.device)  # before it grows: scaled types are the smaller ones
        if self.scales is not None or dtype != joined.dtype:
            stored = dequantise(stored, None if self.scales is None else self.scales.to(joined.device), dtype)
        target.copy_(stored)


@dataclass(frozen=True)
class StoredFrames:
    """The cache of some frames of a sample. Its tensors may be a mapped file: nothing writes to them."""

    stored_keys: tuple[StoredTensors, ...]
    stored_values: tuple[StoredTensors, ...]
    tokens: tuple[int, ...]  # of each frame
    key: CacheKey
    dtype: torch.dtype  # of the compressor, in which readers get the numbers
    text_ids: ClassVar[tuple[int, ...]] = ()

    def take(self, n: int) -> StoredFrames:
        """The first `n` tokens of each frame. Raises ValueError if a frame has fewer."""
        if n > min(self.tokens, default=0):
            raise ValueError(f"cannot read {n} tokens of frames that have {self.tokens}")
        keys, values = (tuple(part.take(n) for part in parts) for parts in (self.stored_keys, self.stored_values))
        return replace(self, stored_keys=keys, stored_values=values, tokens=(n,) * len(self.tokens))

    def copy_to(self, keys: Tensor, values: Tensor) -> None:
        """Write keys and values, frame after frame, into (D, H, M, E) tensors of any number type and device."""
        for joined, parts in ((keys, self.stored_keys), (values, self.stored_values)):
            start = 0
            for part in parts:
                stop = start + len(part.numbers) * part.numbers.shape[3]
                part.copy_to(joined[:, :, start:stop], self.dtype)
                start = stop

    def joined(self) -> VocoCache:
        """The same frames as tensors, which are copies."""
        _, layers, heads, _, width = self.stored_keys[0].numbers.shape
        keys, values = torch.empty(2, layers, heads, sum(self.tokens), width, dtype=self.dtype)
        self.copy_to(keys, values)
        return VocoCache(keys, values, self.tokens, self.key)


def stored_tensors(table: pa.Table, rows: Sequence[int], name: str, facts: dict[str, Any]) -> Iterator[StoredTensors]:
    """ "keys" or "values" of the frames at `rows` of a row group whose columns have one chunk, in that order.

    `facts` is the decoded `cache_metadata`.
    """
    shape, dtype = facts["shape"], facts["dtype"]
    numbers = _tensor(table[name]).view(DTYPES[dtype]).view(-1, *shape)
    scales = None
    if dtype in SCALED_LIMITS:
        scales = _tensor(table[f"{name}_scales"]).view(torch.float32).view(-1, *shape[:2])
    for run in even_runs(rows):
        yield StoredTensors(numbers[run], None if scales is None else scales[run])


def even_runs(rows: Sequence[int]) -> Iterator[slice]:
    """The rows, in order, as slices with positive steps."""
    start = 0
    while start < len(rows):
        step, stop = 1, start + 1
        if stop < len(rows) and rows[stop] > rows[start]:
            step = rows[stop] - rows[start]
            while stop < len(rows) and rows[stop] - rows[stop - 1] == step:
                stop += 1
        yield slice(rows[start], rows[stop - 1] + 1, step)
        start = stop


def _tensor(column: pa.ChunkedArray) -> Tensor:
    """(rows, bytes) uint8: a column's values in their buffer, which lives as long as the tensor."""
    array = column.chunk(0)
    width = array.type.byte_width
    size = len(array) * width
    # by way of DLPack, because torch.frombuffer and from_numpy warn of memory that is read-only
    values = pa.Array.from_buffers(pa.uint8(), size, [None, array.buffers()[1].slice(array.offset * width, size)])
    return from_dlpack(values).view(len(array), width)
