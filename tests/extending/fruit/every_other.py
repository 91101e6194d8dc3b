"""A method: N evenly spaced patches of a view, scaled by a weight that is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from voco.methods import Method
from voco.sequence.sequence import Layout


class Scale(nn.Module):
    """One weight for every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.weight


def pool(features: Tensor, layout: Layout, module: nn.Module | None) -> Tensor:
    """(F, N, C) of features (F, V, C)."""
    assert module is not None
    chosen = torch.linspace(0, features.shape[1] - 1, layout.tokens).round().long()
    scaled: Tensor = module(features[:, chosen])
    return scaled


METHOD = Method(pool=pool, module=lambda layout, width: Scale(width))
