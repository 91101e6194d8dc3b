"""Average pooling: the means of N equal raster groups of a view's features, before the projector."""

from __future__ import annotations

from torch import Tensor, nn

from voco.methods import Method
from voco.sequence.sequence import Layout


def group_means(features: Tensor, count: int) -> Tensor:
    """(F, N, C) means of `count` equal groups of features (F, V, C) in raster order. Raises ValueError unless N divides V."""
    if features.shape[1] % count:
        raise ValueError(f"avg_pool: {features.shape[1]} positions do not fall into {count} equal groups")
    return features.reshape(len(features), count, -1, features.shape[2]).mean(dim=2)


def _pool(features: Tensor, layout: Layout, _module: nn.Module | None) -> Tensor:
    return group_means(features, layout.tokens)


def _check(layout: Layout) -> None:
    if layout.vision_slots % layout.tokens:
        raise ValueError(
            f"compression.tokens: expected a divisor of the tower's {layout.vision_slots} positions, got {layout.tokens}"
        )


METHOD = Method(pool=_pool, check=_check)
