"""The default backend: causal squares of nearly the same size in one call of torch's own kernel each, on any device.

Legend: B rows, Q queries, K keys of a row; H query heads, G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from voco.model.attention.causal_segments import Ints, Segment, causal_segments
from voco.model.attention.flat_rows import flatten_rows, row_index, rows_plan, take_rows, to_device, widen_on_cpu
from voco.model.attention.plan import Backend, RowsPlan
from voco.model.attention.voco_mask import TokenIds

SLICED_CALLS = 4  # with more calls than this, states are gathered instead of sliced
SIZE_STEP = 16  # squares whose sizes differ by less share a call: a kernel call costs more than their empty corners


@dataclass(frozen=True)
class SegmentCall:
    """One kernel call over `count` segments. Query i sees what `mask` says; without one keys 0..i, of as many keys as queries."""

    count: int
    queries: int  # of each segment
    keys: int
    drop: int  # first queries of each, whose outputs are left out
    mask: Tensor | None  # (count, 1, queries, keys) bool

    def run(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(count * (queries - drop), H, E) of (count * queries, H, E) and (count * keys, G, E)."""
        query, key, value = (flat.view(self.count, -1, *flat.shape[1:]).transpose(1, 2) for flat in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[:, :, self.drop :].transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class SegmentsPlan:
    """The calls of a batch, and the rows that they take.

    A segment with more keys than queries gets filler queries in front until there are as many; their outputs are dropped, and
    the square is causal, so it needs no mask. Smaller squares are filled up at their end, which none of their queries sees.
    Where a segment reads more keys before its own than it has, a rectangle with a mask is less work.

    States are gathered once for all calls; a few contiguous stretches are sliced instead. (With many slices, each would cost the
    backward pass a tensor of the entire row's size.)
    """

    calls: tuple[SegmentCall, ...]
    queries: Tensor | None  # (sum of count * queries,) int64, indices into the flattened (B x Q); None: all, in order
    keys: Tensor | None  # (sum of count * keys,) int64, into (B x K)
    back: Tensor | None  # (B x Q,) int64: the row of each query in the calls' outputs
    starts: tuple[tuple[int, int], ...] | None  # first query and key of each call, instead of `queries` and `keys`
    segments: Sequence[Segment]
    device: torch.device

    @classmethod
    def from_segments(cls, segments: Sequence[Segment], queries: int, keys: int, device: torch.device) -> SegmentsPlan:
        """The plan for a batch of B x Q `queries` and B x K `keys`."""
        groups: dict[tuple[int, int], list[Segment]] = {}
        for segment in segments:
            q, k = len(segment.queries), len(segment.keys)
            size = (0, -(-k // SIZE_STEP)) if k <= 2 * q else (q.bit_length(), k.bit_length())
            groups.setdefault(size, []).append(segment)
        calls, query_rows, key_rows = [], [], []
        back, start = np.zeros(queries, dtype=np.int64), 0
        for (oblong, _), members in groups.items():
            k = max(len(segment.keys) for segment in members)
            q = max(len(segment.queries) for segment in members) if oblong else k
            filler = [0 if oblong else len(segment.keys) - len(segment.queries) for segment in members]
            drop = min(filler)
            filled = [_fill(segment.queries, count, q) for segment, count in zip(members, filler, strict=True)]
            query_rows.append(np.concatenate(filled))
            key_rows.append(np.concatenate([_fill(segment.keys, 0, k) for segment in members]))
            for segment, count in zip(members, filler, strict=True):
                back[segment.queries] = start + count - drop + np.arange(len(segment.queries))
                start += q - drop
            mask = to_device(_oblong_mask(members, q, k), device) if oblong else None
            calls.append(SegmentCall(len(members), q, k, drop, mask))
        back_rows = row_index(back, start, device)
        runs = [(_run_start(query), _run_start(key)) for query, key in zip(query_rows, key_rows, strict=True)]
        starts = tuple((first, second) for first, second in runs if first is not None and second is not None)
        if len(starts) == len(calls) <= SLICED_CALLS:
            return cls(tuple(calls), None, None, back_rows, starts, segments, device)
        all_queries = row_index(np.concatenate(query_rows), queries, device)
        all_keys = row_index(np.concatenate(key_rows), keys, device)
        return cls(tuple(calls), all_queries, all_keys, back_rows, None, segments, device)

    def for_rows(self, rows: Tensor) -> RowsPlan:
        return rows_plan(self.segments, rows, self.device, SegmentsPlan.from_segments)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query_sizes = [call.count * call.queries for call in self.calls]
        key_sizes = [call.count * call.keys for call in self.calls]
        q, k, v = flatten_rows(query), flatten_rows(key), flatten_rows(value)
        if self.starts is None:
            q, k, v = widen_on_cpu(take_rows(q, self.queries), take_rows(k, self.keys), take_rows(v, self.keys))
            parts = list(zip(torch.split(q, query_sizes), torch.split(k, key_sizes), torch.split(v, key_sizes), strict=True))
        else:
            q, k, v = widen_on_cpu(q, k, v)
            spans = [
                (slice(first, first + queries), slice(second, second + keys))
                for (first, second), queries, keys in zip(self.starts, query_sizes, key_sizes, strict=True)
            ]
            parts = [(q[query_span], k[key_span], v[key_span]) for query_span, key_span in spans]
        outs = [call.run(*part, scale) for call, part in zip(self.calls, parts, strict=True)]
        out = take_rows(outs[0] if len(outs) == 1 else torch.cat(outs), self.back)
        return out.to(query.dtype).view(query.shape[0], -1, *out.shape[1:])


def _run_start(rows: Ints) -> int | None:
    """The first of consecutive rows; None when they are not consecutive."""
    return int(rows[0]) if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))) else None


def _fill(rows: Ints, before: int, size: int) -> Ints:
    """Rows with filler before and after them; results of filler are never used."""
    front = np.maximum(rows[0] - np.arange(before, 0, -1), 0)
    return np.concatenate([front, rows, np.repeat(rows[-1:], size - before - len(rows))])


def _oblong_mask(members: Sequence[Segment], q: int, k: int) -> Tensor:
    """(count, 1, q, k) bool; a filler query sees all keys, so that its softmax is not empty."""
    rows, columns = np.arange(q)[:, None], np.arange(k)[None, :]
    masks = []
    for segment in members:
        ahead = len(segment.keys) - len(segment.queries)
        masks.append((columns <= rows + ahead) | (rows >= len(segment.queries)))
    return torch.from_numpy(np.stack(masks))[:, None]


def _plan(ids: TokenIds, views_apart: bool, device: torch.device, queries: int | None) -> SegmentsPlan:
    rows, length = ids.kind.shape
    segments = causal_segments(ids, views_apart, queries)
    return SegmentsPlan.from_segments(segments, rows * (length if queries is None else queries), rows * length, device)


BACKEND = Backend(_plan)
