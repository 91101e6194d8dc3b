"""Elastic N: how many <voco> tokens each sample of a step is trained with, one pure function of seed, step and row.

All <voco> share one embedding row and are causal, so the first N' tokens of a view are those of a model with N = N'. A checkpoint
that was trained at several N answers at each of them; trained on some samples uncompressed, it answers without compression too.
(Nested tokens for all budgets: Matryoshka Multimodal Models, arXiv 2405.17430, which draws one size for each step.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from voco.job.compression import Compression
from voco.train.sampler import Rows

WHOLE = 0  # of a sample that is read uncompressed: text sees all of its views
Floats = npt.NDArray[np.float64]


def _uniform(sizes: int, _progress: float) -> Floats:
    return np.ones(sizes)


def _geometric(sizes: int, _progress: float) -> Floats:
    """Each N twice as often as the next larger one."""
    return np.power(2.0, -np.arange(sizes, dtype=np.float64))


def _curriculum(sizes: int, progress: float) -> Floats:
    """From large to small: the largest N alone at first, smaller ones added at equal distances, all in the second half."""
    smallest = sizes - min(sizes, 1 + int(2 * progress * sizes))
    return (np.arange(sizes) >= smallest).astype(np.float64)


# how often each of several N, ascending, is drawn when a share of the steps is done
RULES: dict[str, Callable[[int, float], Floats]] = {"uniform": _uniform, "geometric": _geometric, "curriculum": _curriculum}


@dataclass(frozen=True)
class TokenDraw:
    """The draw of a job of `total` steps."""

    compression: Compression
    seed: int
    total: int

    def probabilities(self, step: int) -> Floats:
        """(K,) of each N of the compression, ascending, in a compressed sample of this step."""
        weights = RULES[self.compression.rule](len(self.compression.sizes), step / self.total)
        probabilities: Floats = weights / weights.sum()
        return probabilities

    def __call__(self, rows: Rows, step: int) -> list[int]:
        """N of the samples at (n, 2) rows, WHOLE for those that are read uncompressed. The same on any number of workers."""
        bounds = np.cumsum(self.probabilities(step))[:-1]
        return [self._draw(bounds, step, group, row) for group, row in rows.tolist()]

    def _draw(self, bounds: Floats, step: int, group: int, row: int) -> int:
        if group < 0:  # the fill of an epoch's tail, which is no sample
            return self.compression.most_tokens
        whole, which = np.random.default_rng((self.seed, step, group, row)).random(2)
        if whole < self.compression.share_whole:
            return WHOLE
        return self.compression.sizes[int(np.searchsorted(bounds, which, side="right"))]


def token_draw(config: dict[str, Any], total: int) -> TokenDraw | None:
    """The draw of a training of `total` steps by its `launch.fit` config; None where all samples are compressed alike."""
    if config.get("compression") is None:
        return None
    compression = Compression.model_validate(config["compression"])
    return TokenDraw(compression, config["seed"], total) if compression.is_elastic else None
