"""The reference backend: torch's kernel with every pair spelled out in a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from voco.model.attention.flat_rows import widen_on_cpu
from voco.model.attention.plan import Backend
from voco.model.attention.voco_mask import TokenIds, pair_mask


@dataclass(frozen=True)
class DensePlan:
    """Every pair, with a mask."""

    mask: Tensor  # (B, 1, Q, K) bool

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (rows, heads, queries, width), shared = query.shape, query.shape[1] // key.shape[1]
        if queries == 1:  # one new token: heads that share keys take the place of queries, and no key is repeated
            query = query.reshape(rows, heads // shared, shared, width)
        else:
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        query, key, value, dtype = *widen_on_cpu(query, key, value), query.dtype
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scale)
        return out.to(dtype).reshape(rows, heads, queries, width).transpose(1, 2)


def _plan(ids: TokenIds, views_apart: bool, device: torch.device, queries: int | None) -> DensePlan:
    return DensePlan(pair_mask(ids, views_apart, queries)[:, None].to(device))


BACKEND = Backend(_plan)
