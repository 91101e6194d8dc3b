"""FlashAttention over segments of unequal lengths in one call, on NVIDIA GPUs in bf16 or fp16 (arXiv 2307.08691).

Legend: B rows, Q queries, K keys of a row; H query heads, G key-value heads, E head width; T queries in all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voco.model.attention.causal_segments import Segment, causal_segments
from voco.model.attention.flat_rows import flatten_rows, row_index, rows_plan, take_rows, to_device
from voco.model.attention.plan import Backend, RowsPlan
from voco.model.attention.voco_mask import TokenIds


@dataclass(frozen=True)
class VarlenPlan:
    """Segments one after the other, each causal and aligned at its end."""

    queries: Tensor | None  # (T,) int64, indices into the flattened (B x Q); None: all, in order
    keys: Tensor | None  # int64, into (B x K)
    back: Tensor | None  # (B x Q,) int64: the row of each query in the output
    query_ends: Tensor  # (segments + 1,) int32, on the device: 0 and the end of each segment's queries
    key_ends: Tensor
    longest: tuple[int, int]  # queries and keys of a segment
    segments: Sequence[Segment]
    device: torch.device

    @classmethod
    def from_segments(cls, segments: Sequence[Segment], queries: int, keys: int, device: torch.device) -> VarlenPlan:
        """The plan for a batch of B x Q `queries` and B x K `keys`."""
        query_rows = np.concatenate([segment.queries for segment in segments])
        key_rows = np.concatenate([segment.keys for segment in segments])
        back = np.zeros(queries, dtype=np.int64)
        back[query_rows] = np.arange(len(query_rows))
        sizes = [[len(segment.queries) for segment in segments], [len(segment.keys) for segment in segments]]
        ends = [to_device(torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), device) for lengths in sizes]
        return cls(
            row_index(query_rows, queries, device),
            row_index(key_rows, keys, device),
            row_index(back, len(query_rows), device),
            ends[0],
            ends[1],
            (max(sizes[0]), max(sizes[1])),
            segments,
            device,
        )

    def for_rows(self, rows: Tensor) -> RowsPlan:
        return rows_plan(self.segments, rows, self.device, VarlenPlan.from_segments)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q = take_rows(flatten_rows(query), self.queries)
        k, v = (take_rows(flatten_rows(states), self.keys) for states in (key, value))
        out = take_rows(varlen_kernel()(q, k, v, self.query_ends, self.key_ends, *self.longest, scale), self.back)
        return out.view(query.shape[0], -1, *out.shape[1:])


@cache
def varlen_kernel() -> Callable[..., Tensor]:
    """flash-attn where it is installed, else torch's own: (T, H, E) of query, key, value, ends, longest lengths and scale.

    Both raise for numbers that are neither bf16 nor fp16.
    """
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        return lambda *args: flash_attn_varlen_func(*args[:-1], softmax_scale=args[-1], causal=True)
    from torch.nn.attention.varlen import varlen_attn

    def kernel(*args: Any) -> Tensor:
        grouped = args[0].shape[1] != args[1].shape[1]
        out: Tensor = varlen_attn(*args[:-1], scale=args[-1], window_size=(-1, 0), enable_gqa=grouped)  # type: ignore[assignment]
        return out

    return kernel


def _plan(ids: TokenIds, views_apart: bool, device: torch.device, queries: int | None) -> VarlenPlan:
    rows, length = ids.kind.shape
    segments = causal_segments(ids, views_apart, queries)
    return VarlenPlan.from_segments(segments, rows * (length if queries is None else queries), rows * length, device)


def _available() -> bool:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    return importlib.util.find_spec("flash_attn") is not None or torch.backends.cuda.is_flash_attention_available()


BACKEND = Backend(_plan, _available, needs="an NVIDIA GPU of compute capability 8.0 or newer")
