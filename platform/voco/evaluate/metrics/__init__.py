"""Benchmark metrics, one file each, which ends in `METRIC = Metric(...)`. `job/tables.py` has a row for each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from voco.job.tables import METRICS

if TYPE_CHECKING:  # `voco score` starts without numpy: a bootstrap, which calls `sums`, imports it
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    # (A, K): what each of A answers adds to K sums; (R, K) -> (R,): the published figure of R such sums, NaN where there is none
    Sums = tuple[Floats, Callable[[Floats], Floats]]

# A marked answer: `prediction`, `references` and `mark`, and what the set gives of `category`, `image` (the name of its file),
# `choices` and `question_id`; each may be missing or None
MarkedAnswer = dict[str, Any]
Figures = dict[str, float]  # a set's figures by name, the published one first; those of a category are named `CATEGORY/FIGURE`


@dataclass(frozen=True)
class Metric:
    """How an answer is marked, and how a set's official figures come from marked answers.

    `mark(prediction, references)` is 0.0 for a wrong answer to 1.0 for a right one; with `reads_choices` it is
    `mark(prediction, references, choices)`.
    """

    name: str
    mark: Callable[..., float]
    aggregate: Callable[[Sequence[MarkedAnswer]], Figures] | None = None  # default: `accuracy_figures`; raises Refused
    headline: str = "accuracy"  # the figure that papers print
    headline_is_mean: bool = False  # with `aggregate`: it is the mean mark of all answers, whatever the set
    sums: Callable[[Sequence[MarkedAnswer]], Sums] | None = None  # the published figure by sums, for a fast bootstrap
    groups: Callable[[Sequence[MarkedAnswer]], Sequence[Hashable]] | None = None  # equal labels: `aggregate` needs these together
    reads_choices: bool = False
    needs: tuple[str, ...] = ()  # keys that every answer must have for `aggregate`
    note: str = ""  # what a reader of the figures must know

    @property
    def publishes_mean(self) -> bool:
        """True when the published figure is the mean mark."""
        return self.aggregate is None or self.headline_is_mean


def get_metric(name: str) -> Metric:
    """The metric of a row of `METRICS`. Raises Refused for a name without a row."""
    return METRICS.implementation(name, __name__, "METRIC", Metric)


def mark_answer(metric: Metric, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float | None:
    """The mark of one answer; None for a question without references."""
    if not references:
        return None
    return float(metric.mark(prediction, references, *([choices] if metric.reads_choices else [])))


def official_figures(metric: Metric, answers: Sequence[MarkedAnswer]) -> Figures:
    """A set's official figures, over its answers with a mark; none when no answer has a mark.

    Raises Refused when the answers are not such a set, for example one question of a pair is missing.
    """
    marked = [answer for answer in answers if answer["mark"] is not None]
    return (metric.aggregate or accuracy_figures)(marked) if marked else {}


def published_name(metric: Metric, figures: Figures) -> str:
    """The name of a set's published figure: the headline, or the first figure of a part of the set that has no headline."""
    return metric.headline if metric.headline in figures else next(iter(figures))


def ratio(totals: Floats, divisors: Floats) -> Floats:
    """totals / divisors, element by element; NaN where there is nothing to divide by."""
    import numpy as np

    quotient = np.full(totals.shape, np.nan)
    np.divide(totals, divisors, out=quotient, where=divisors > 0)
    return quotient


def accuracy_figures(answers: Sequence[MarkedAnswer]) -> Figures:
    """The mean mark of all answers, and of each category where there are several."""
    groups = by_category(answers)
    categories = {f"{name}/accuracy": mean_mark(group) for name, group in groups.items()} if len(groups) > 1 else {}
    return {"accuracy": mean_mark(answers), **categories}


def mean_mark(answers: Sequence[MarkedAnswer]) -> float:
    """The mean mark of at least one answer."""
    return float(sum(answer["mark"] for answer in answers)) / len(answers)


def by_category(answers: Sequence[MarkedAnswer]) -> dict[str, list[MarkedAnswer]]:
    """The answers of each category, by its name; `none` for answers without one."""
    groups: dict[str, list[MarkedAnswer]] = {}
    for answer in answers:
        groups.setdefault(answer.get("category") or "none", []).append(answer)
    return dict(sorted(groups.items()))


def figure_text(value: float) -> str:
    """A share with four digits; a count, or a sum of percentages, with two."""
    return f"{value:.4f}" if abs(value) <= 1 and not isinstance(value, int) else f"{value:,.2f}".removesuffix(".00")
