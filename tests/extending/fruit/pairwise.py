"""An attention backend: softmax of every allowed pair, spelled out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from voco.model.attention.plan import Backend
from voco.model.attention.voco_mask import TokenIds, pair_mask


@dataclass(frozen=True)
class PairwisePlan:
    mask: Tensor  # (B, 1, Q, K) bool

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        scores = (query @ key.mT * scale).masked_fill(~self.mask, -torch.inf)
        return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def plan(ids: TokenIds, views_apart: bool, device: torch.device, queries: int | None) -> PairwisePlan:
    return PairwisePlan(pair_mask(ids, views_apart, queries)[:, None].to(device))


BACKEND = Backend(plan)
