"""The share of the uncompressed model's quality that a method retains, by both published definitions, with intervals.

Sources: VoCo-LLaMA Table 1 counts from the lower bound, its supplement's Table 4 divides by the upper bound. The
intervals are percentile intervals of a cluster bootstrap (Davison and Hinkley 1997, section 3.8): questions about one
image are not independent, so samples are drawn with all their questions. Pure functions of numpy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST_SPAN = 1e-9  # a ratio with a smaller divisor is noise
LEVEL = 0.95

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def retention(score: float, lower: float, upper: float) -> float | None:
    """(score - lower) / (upper - lower), the paper's Table 1: 0 is the lower bound, 1 the upper bound.

    Above 1 or below 0 is possible. None when the bounds are equal.
    """
    span = upper - lower
    return None if abs(span) < SMALLEST_SPAN else (score - lower) / span


def share_of_upper(score: float, upper: float) -> float | None:
    """score / upper, the supplement's Table 4. None when the upper bound is zero."""
    return None if abs(upper) < SMALLEST_SPAN else score / upper


@dataclass(frozen=True)
class Resampled:
    """Scores of several methods on the same questions, and the same scores on resampled samples.

    Draw r of every method uses the same samples, so ratios and differences of methods are paired.
    """

    scores: dict[str, float]  # method -> mean of `correct` over all questions
    draws: dict[str, Floats]  # method -> (R,) the mean in each resample

    def score(self, method: str) -> Interval:
        """95 % interval of a method's score."""
        return _interval(self.draws[method])

    def retention(self, method: str, lower: str, upper: str) -> Interval | None:
        """95 % interval of `retention`; None when the bounds are equal in the data or in a resample in twenty."""
        if retention(self.scores[method], self.scores[lower], self.scores[upper]) is None:
            return None
        return _ratio_interval(self.draws[method] - self.draws[lower], self.draws[upper] - self.draws[lower])

    def share_of_upper(self, method: str, upper: str) -> Interval | None:
        """95 % interval of `share_of_upper`, under the same rule."""
        if share_of_upper(self.scores[method], self.scores[upper]) is None:
            return None
        return _ratio_interval(self.draws[method], self.draws[upper])

    def difference(self, method: str, other: str) -> Interval:
        """95 % interval of score(method) - score(other), paired."""
        return _interval(self.draws[method] - self.draws[other])


def bootstrap(
    correct_by_method: dict[str, NDArray[np.float64]], sample_of_question: NDArray[np.generic], resamples: int, seed: int
) -> Resampled:
    """Draw samples with replacement, jointly for all methods.

    correct_by_method: (Q,) float per method, question q the same in all, 0 to 1
    sample_of_question: (Q,) any sortable label of the sample that question q is about
    Raises ValueError for arrays of different lengths, or no question.

    A resample of the G samples gives sample g the weight w_g (multinomial), so its score is sum_g w_g s_g / sum_g w_g c_g
    with s_g and c_g the sum of `correct` and the number of questions of sample g: one pass over Q.
    """
    lengths = {len(sample_of_question), *(len(values) for values in correct_by_method.values())}
    if len(lengths) != 1 or not correct_by_method or len(sample_of_question) == 0:
        raise ValueError(f"expected every method to have the same questions, at least one; got lengths {sorted(lengths)}")
    names = list(correct_by_method)
    _, group = np.unique(sample_of_question, return_inverse=True)
    counts = np.bincount(group)  # (G,)
    sums = np.stack([np.bincount(group, weights=correct_by_method[name]) for name in names], axis=1)  # (G, M)
    sums_and_counts = np.concatenate([sums, counts[:, None]], axis=1)  # (G, M + 1)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, len(names)))
    for index in range(resamples):
        weights = np.bincount(generator.integers(len(counts), size=len(counts)), minlength=len(counts))
        totals = weights @ sums_and_counts
        means[index] = totals[:-1] / totals[-1]
    return Resampled(
        scores={name: float(np.mean(correct_by_method[name])) for name in names},
        draws={name: means[:, column] for column, name in enumerate(names)},
    )


def _interval(draws: Floats) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _ratio_interval(numerators: Floats, denominators: Floats) -> Interval | None:
    """Interval of a ratio over the draws in which it exists; None when it is missing in more than 5 % of them."""
    valid = np.abs(denominators) >= SMALLEST_SPAN
    if valid.mean() < LEVEL:
        return None
    return _interval(numerators[valid] / denominators[valid])
