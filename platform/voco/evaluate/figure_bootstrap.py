"""The bootstrap of a set's published figure where that is not the mean mark: POPE's mean F1, MME's sums, MMBench's circles.

Images are drawn with all their questions, the same for every method. Answers that a metric needs together, such as both of an
image of MME or all rotations of an item of MMBench, are drawn together, also when they belong to several samples. An image that
is drawn twice counts as two images with two sets of questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from voco.evaluate.metrics import MarkedAnswer, Metric, official_figures, published_name
from voco.evaluate.retention import Floats, Resampled, draw_samples, resampled_totals

AnswersByMethod = Mapping[str, Sequence[MarkedAnswer]]  # answer q of every method is to the same question, and has a mark
Rename = Callable[[MarkedAnswer, int], MarkedAnswer]


def bootstrap_figure(
    metric: Metric, answers: AnswersByMethod, samples: NDArray[np.generic], resamples: int, seed: int
) -> tuple[str, Resampled]:
    """The name of the set's published figure, and the figure of every method with its draws.

    samples: (Q,) any sortable label of the sample that question q is about
    Raises Refused when the answers are not a complete set. By sums where the metric has them, else by its `aggregate`, which is
    exact too and takes about as long as `resamples` aggregations.
    """
    figures = {method: official_figures(metric, rows) for method, rows in answers.items()}
    name = published_name(metric, next(iter(figures.values())))
    units = resampling_units(metric, next(iter(answers.values())), samples)
    draws = draws_by_sums if metric.sums is not None else draws_by_rows
    return name, Resampled(
        scores={method: float(figures[method][name]) for method in answers},
        draws={method: draws(metric, name, rows, units, resamples, seed) for method, rows in answers.items()},
    )


def resampling_units(metric: Metric, answers: Sequence[MarkedAnswer], samples: NDArray[np.generic]) -> NDArray[np.int64]:
    """(Q,) the unit that each question is drawn with: its sample, and samples joined where a group of the metric spans several.

    Units are numbered in the order of their first sample's label, so that the draws do not depend on the order of the rows.
    """
    _, sample = np.unique(samples, return_inverse=True)
    parent = list(range(int(sample.max()) + 1))

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    first: dict[object, int] = {}
    for group, label in zip(metric.groups(answers) if metric.groups is not None else [], sample.tolist(), strict=False):
        low, high = sorted((root(first.setdefault(group, label)), root(label)))
        parent[high] = low
    return np.array([root(label) for label in sample.tolist()])


def draws_by_sums(
    metric: Metric, name: str, answers: Sequence[MarkedAnswer], units: NDArray[np.int64], resamples: int, seed: int
) -> Floats:
    """(R,) the published figure in each resample, from sums over units. `name` is not used: the sums are of that figure."""
    assert metric.sums is not None
    values, figure = metric.sums(answers)
    return figure(resampled_totals(values, units, resamples, seed))


def add_copy(answer: MarkedAnswer, copy: int) -> MarkedAnswer:
    """The answer as a further image's: its question id ends in `#2`, its file is in the folder `copy-2`."""
    question, image = answer.get("question_id"), answer.get("image")
    return {
        **answer,
        "question_id": None if question is None else f"{question}#{copy}",
        "image": f"copy-{copy}/{image}" if image else image,
    }


def draws_by_rows(
    metric: Metric,
    name: str,
    answers: Sequence[MarkedAnswer],
    units: NDArray[np.int64],
    resamples: int,
    seed: int,
    rename: Rename = add_copy,
) -> Floats:
    """(R,) the figure `name` in each resample, NaN where it has none: the drawn answers go through the metric's `aggregate`.

    A unit's second copy and later ones are renamed, so that no rule takes them for the same question.
    """
    labels, unit = np.unique(units, return_inverse=True)
    rows: list[list[int]] = [[] for _ in labels]
    for position, number in enumerate(unit.tolist()):
        rows[number].append(position)
    draws = np.empty(resamples)
    for index, drawn in enumerate(draw_samples(len(labels), resamples, seed)):
        chosen: list[MarkedAnswer] = []
        for number, count in enumerate(np.bincount(drawn, minlength=len(labels)).tolist()):
            for copy in range(1, count + 1):
                chosen += [answers[row] if copy == 1 else rename(answers[row], copy) for row in rows[number]]
        draws[index] = official_figures(metric, chosen).get(name, np.nan)
    return draws
