"""The share of the uncompressed model's quality that a method retains, by both published definitions, with intervals.

Sources: VoCo-LLaMA Table 1 counts from the lower bound, its supplement's Table 4 divides by the upper bound. The
intervals are percentile intervals of a cluster bootstrap (Davison and Hinkley 1997, section 3.8): questions about one
image are not independent, so samples are drawn with all their questions. Pure functions of numpy arrays; a set's published
figure that is not the mean mark is resampled by `figure_bootstrap.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
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

    scores: dict[str, float]  # method -> mean of `correct` over all questions, or the set's published figure
    draws: dict[str, Floats]  # method -> (R,) the same in each resample, NaN where a resample has no figure

    def score(self, method: str) -> Interval | None:
        """95 % interval of a method's score; None when it is missing in a resample in twenty."""
        return _valid_interval(self.draws[method], np.isfinite(self.draws[method]))

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
        """95 % interval of score(method) - score(other), paired; of mean marks, which every resample has."""
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
    columns = [*(correct_by_method[name] for name in names), np.ones(len(sample_of_question))]
    totals = resampled_totals(np.stack(columns, axis=1), sample_of_question, resamples, seed)  # (R, M + 1)
    means = totals[:, :-1] / totals[:, -1:]
    return Resampled(
        scores={name: float(np.mean(correct_by_method[name])) for name in names},
        draws={name: means[:, column] for column, name in enumerate(names)},
    )


def resampled_totals(values: Floats, sample_of_question: NDArray[np.generic], resamples: int, seed: int) -> Floats:
    """(R, K): the column sums of `values` (Q, K) over the questions of each resample's samples, as often as they are drawn."""
    _, group = np.unique(sample_of_question, return_inverse=True)
    sums = np.stack([np.bincount(group, weights=column) for column in values.T], axis=1)  # (G, K)
    totals = np.empty((resamples, values.shape[1]))
    for index, drawn in enumerate(draw_samples(len(sums), resamples, seed)):
        totals[index] = np.bincount(drawn, minlength=len(sums)) @ sums
    return totals


def draw_samples(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Each resample: (G,) numbers of G samples, drawn with replacement. The order of samples is that of their sorted labels."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(count, size=count)


def _ratio_interval(numerators: Floats, denominators: Floats) -> Interval | None:
    """Interval of a ratio over the draws in which it exists."""
    valid = np.isfinite(numerators) & (np.abs(denominators) >= SMALLEST_SPAN)  # a comparison with NaN is false
    return _valid_interval(np.divide(numerators, denominators, out=np.zeros_like(numerators), where=valid), valid)


def _valid_interval(draws: Floats, valid: NDArray[np.bool_]) -> Interval | None:
    """Interval of the valid draws; None when more than 5 % of them are not."""
    if valid.mean() < LEVEL:
        return None
    return _interval(draws[valid])


def _interval(draws: Floats) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
