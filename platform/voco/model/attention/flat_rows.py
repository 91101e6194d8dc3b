"""States as kernels take them: the rows of a batch flattened into one, gathered by index; in fp32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from voco.model.attention.causal_segments import Ints, Segment, segments_of_rows
from voco.model.attention.plan import AttentionPlan, RowsPlan


def flatten_rows(states: Tensor) -> Tensor:
    """(B x L, H, E) of (B, H, L, E)."""
    return states.transpose(1, 2).flatten(0, 1)


def take_rows(flat: Tensor, index: Tensor | None) -> Tensor:
    """The rows at an index (`row_index`); all of them for None."""
    return flat if index is None else flat.index_select(0, index)


def row_index(index: Ints, rows: int, device: torch.device) -> Tensor | None:
    """The index on the device; None where it takes all `rows` in order."""
    return None if np.array_equal(index, np.arange(rows)) else to_device(torch.from_numpy(index), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device: from page-locked memory, because any other copy waits for all work before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def rows_plan(segments: Sequence[Segment], rows: Tensor, device: torch.device, plan: Callable[..., AttentionPlan]) -> RowsPlan:
    """The part of a plan for some rows; `plan(segments, queries, keys, device)` makes the backend's."""
    part = segments_of_rows(segments, rows.numpy())
    keys, queries, back = (to_device(torch.from_numpy(index), device) for index in (part.keys, part.queries, part.back))
    return RowsPlan(keys, queries, back, plan(part.segments, len(part.queries), len(part.keys), device))


def widen_on_cpu(*states: Tensor) -> tuple[Tensor, ...]:
    """fp32 on a CPU: torch's kernels are many times slower there in bf16, the backward pass most of all, and less exact."""
    narrow = states[0].device.type == "cpu" and states[0].dtype in (torch.bfloat16, torch.float16)
    return tuple(tensor.float() for tensor in states) if narrow else states
