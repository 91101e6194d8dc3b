"""Average pooling: the means of N equal raster groups of a view's features."""

from __future__ import annotations

from torch import Tensor


def group_means(features: Tensor, count: int) -> Tensor:
    """(F, N, C) means of `count` equal groups of features (F, V, C) in raster order. Raises ValueError where V is no multiple."""
    if features.shape[1] % count:
        raise ValueError(f"avg_pool: {features.shape[1]} positions do not fall into {count} equal groups")
    return features.reshape(len(features), count, -1, features.shape[2]).mean(dim=2)
