"""Compression methods, one file each, which ends in `METHOD = Method(...)`. `job/tables.py` has a row for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from voco.job.tables import METHODS
from voco.sequence.sequence import Layout


def _keep_features(features: Tensor, _layout: Layout, _module: nn.Module | None) -> Tensor:
    return features


def _no_module(_layout: Layout, _width: int) -> nn.Module | None:
    return None


def _accept(_layout: Layout) -> None:
    return None


@dataclass(frozen=True)
class Method:
    """What the model does under a method; mask, positions and names are in its row of `METHODS`.

    F views, V vision slots, C channels of a feature, `slots` of the layout: V, or N where the method is pooled.
    """

    # (F, slots, C) of features (F, V, C), the layout and the method's module; default: unchanged
    pool: Callable[[Tensor, Layout, nn.Module | None], Tensor] = _keep_features
    # the method's own weights for a layout and a width C, drawn from torch's generator; saved under the method's name
    module: Callable[[Layout, int], nn.Module | None] = _no_module
    # raises ValueError, as `key.path: expected X, got Y`, for a layout that the method cannot have
    check: Callable[[Layout], None] = _accept


def get_method(name: str) -> Method:
    """The method of a row of `METHODS`. Raises Refused for a name without a row."""
    return METHODS.implementation(name, __name__, "METHOD", Method)
