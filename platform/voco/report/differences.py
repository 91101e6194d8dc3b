"""Paired differences: one evaluation's score minus another's on the same questions, overall and by category."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from voco.errors import Refused
from voco.evaluate.retention import bootstrap
from voco.evaluate.scores import FRAME_METHODS, join_correct
from voco.report.outputs import Output
from voco.store.schemas import ALL

# Labels of the evaluations that read fewer frames of a video, or read them out of order, by their column `method`.
FRAME_VARIANTS = {FRAME_METHODS["shuffled"]: "frames shuffled", FRAME_METHODS["one"]: "one frame only"}
RESAMPLES = 2000

EvaluatedRow = tuple[Output, dict[str, Any]]  # an evaluation and its row of category "all"


@dataclass(frozen=True)
class Difference:
    """Score of one method minus another's on the same questions, with its 95 % interval by the bootstrap over samples."""

    label: str
    other: str
    other_method: str
    category: str
    value: float
    low: float
    high: float
    questions: int

    @property
    def significant(self) -> bool:
        """True when the interval does not contain zero."""
        return self.low > 0 or self.high < 0


def differences(rows: list[EvaluatedRow]) -> tuple[list[Difference], list[str]]:
    """Each VoCo evaluation minus every other method, every other N, and its own frame variants.

    Frame variants are also compared by category. The second value names each pair that could not be compared, and why.
    """
    answers: dict[tuple[str, int], pa.Table | None] = {}
    paired: list[Difference] = []
    unpaired: list[str] = []
    for first, second in _pairs(rows):
        for output, row in (first, second):
            if (output.uri, row["n"]) not in answers:
                answers[output.uri, row["n"]] = answers_at(output, row["n"])
        by_label = {row["label"]: answers[output.uri, row["n"]] for output, row in (first, second)}
        tables = {label: table for label, table in by_label.items() if table is not None}
        if len(tables) < 2:
            unpaired.append(f"{first[1]['label']} against {second[1]['label']}: answers are missing")
            continue
        rules = [row["metric"] for _, row in (first, second)]
        if rules[0] != rules[1]:
            unpaired.append(f"{first[1]['label']} against {second[1]['label']}: marked by {rules[0]} and by {rules[1]}")
            continue
        try:
            paired += _paired(tables, first[1], second[1])
        except Refused as error:
            unpaired.append(str(error))
    return paired, unpaired


def answers_at(output: Output, n: int) -> pa.Table | None:
    """An evaluation's answers with `n` tokens (an evaluation may read several n); None when its files are gone."""
    table = output.read("answers")
    return None if table is None else table.filter(pc.equal(table["n"], n))


def _pairs(rows: list[EvaluatedRow]) -> Iterator[tuple[EvaluatedRow, EvaluatedRow]]:
    """(a VoCo evaluation, what it is compared with), each pair once."""
    compared = [item for item in rows if item[1]["role"] == "compared"]
    for index, first in enumerate(compared):
        row = first[1]
        if row["method"] != "voco":
            continue
        for position, second in enumerate(compared):
            other = second[1]
            if other["method"] in FRAME_VARIANTS:
                if (other["checkpoint"], other["n"]) == (row["checkpoint"], row["n"]):
                    yield first, second
            elif other["method"] == "voco":
                if position > index and other["n"] != row["n"]:
                    yield first, second
            elif other["method"] != "none":
                yield first, second


def _paired(tables: dict[str, pa.Table], row: dict[str, Any], other: dict[str, Any]) -> Iterator[Difference]:
    """The difference over all questions, and by category for a frame variant. Raises Refused when the questions differ."""
    samples, categories, correct = join_correct(tables)
    label, other_label = row["label"], other["label"]
    groups = [ALL]
    if other["method"] in FRAME_VARIANTS and len(set(categories.tolist())) > 1:
        groups += sorted(set(categories.tolist()))
    for category in groups:
        mask = np.ones(len(samples), dtype=bool) if category == ALL else categories == category
        resampled = bootstrap(
            {name: values[mask] for name, values in correct.items()}, samples[mask], RESAMPLES, row["seed"] or 0
        )
        low, high = resampled.difference(label, other_label)
        value = resampled.scores[label] - resampled.scores[other_label]
        yield Difference(label, other_label, other["method"], category, value, low, high, int(mask.sum()))


def difference_text(difference: Difference, standalone: bool = False) -> str:
    """One sentence. `standalone`: it names both methods and the number of questions."""
    points = f"{abs(100 * difference.value):.1f} points {'above' if difference.value > 0 else 'below'} {difference.other}"
    if difference.other_method in FRAME_VARIANTS:
        points += f" for {difference.category} questions" if difference.category != ALL else ""
    interval = f"95 % interval of the paired difference {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    if standalone:
        interval += f", over {difference.questions:,} questions"
    end = "" if difference.significant else "; it contains zero, so the difference is not significant"
    return f"{difference.label if standalone else 'It'} is {points} ({interval}{end})."
