"""torch's FlexAttention: compiled on a GPU, where blocks without a pair are skipped; eager on a CPU, without a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from voco.model.attention.flat_rows import widen_on_cpu
from voco.model.attention.plan import Backend
from voco.model.attention.voco_mask import TokenIds, may_attend


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


@dataclass(frozen=True)
class FlexPlan:
    """The mask as a function of pairs, and the blocks in which it allows any."""

    blocks: BlockMask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        run: Callable[..., Any] = _compiled() if query.is_cuda else flex_attention  # type: ignore[assignment]
        query, key, value, dtype = *widen_on_cpu(query, key, value), query.dtype
        grouped = query.shape[1] != key.shape[1]
        out: Tensor = run(query, key, value, block_mask=self.blocks, scale=scale, enable_gqa=grouped)
        return out.to(dtype).transpose(1, 2)


def flex_plan(ids: TokenIds, views_apart: bool, device: torch.device, queries: int | None) -> FlexPlan:
    rows, length = ids.kind.shape
    count = length if queries is None else queries
    on_device = ids.to(device)

    def pair(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        index = query + (length - count)
        return may_attend(on_device[row, index], index, on_device[row, key], key, views_apart)

    return FlexPlan(create_block_mask(pair, rows, None, count, length, device=device))


BACKEND = Backend(flex_plan)
