"""Paired differences: one evaluation's score minus another's on the same questions, over all of them and by category."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from voco.errors import Refused
from voco.evaluate.retention import bootstrap
from voco.evaluate.scores import ALL, join_correct
from voco.report.outputs import Output

VARIANTS = ("shuffled_frames", "one_frame")  # methods that answer to less than the whole video
RESAMPLES = 2000

Held = tuple[Output, dict[str, Any]]  # an evaluation and its row of category "all"


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
    def settled(self) -> bool:
        """True when the interval is on one side of zero."""
        return self.low > 0 or self.high < 0


def differences(whole: list[Held]) -> tuple[list[Difference], list[str]]:
    """Every VoCo evaluation minus every other way to compress, every other N, and its own answers to less than the video.

    Against the last, by category too. Also returns why a difference is missing.
    """
    answers: dict[tuple[str, int], pa.Table | None] = {}
    found: list[Difference] = []
    unpaired: list[str] = []
    for (output, row), (other, against) in _pairs(whole):
        held = {}
        for line, one in ((row, output), (against, other)):
            key = (one.uri, line["n"])
            if key not in answers:
                answers[key] = answers_at(one, line["n"])
            held[line["label"]] = answers[key]
        tables = {label: table for label, table in held.items() if table is not None}
        if len(tables) < 2:
            unpaired.append(f"{row['label']} against {against['label']}: answers are missing")
            continue
        try:
            found += _paired(tables, row, against)
        except Refused as error:
            unpaired.append(str(error))
    return found, unpaired


def answers_at(output: Output, n: int) -> pa.Table | None:
    """An evaluation's answers with `n` tokens, which may be one of several; None when they are gone."""
    table = output.read("answers")
    return None if table is None else table.filter(pc.equal(table["n"], n))


def _pairs(whole: list[Held]) -> Iterator[tuple[Held, Held]]:
    compared = [item for item in whole if item[1]["role"] == "compared"]
    for index, ours in enumerate(compared):
        if ours[1]["method"] != "voco":
            continue
        for place, other in enumerate(compared):
            row, against = ours[1], other[1]
            if against["method"] in VARIANTS:
                if (against["checkpoint"], against["n"]) == (row["checkpoint"], row["n"]):
                    yield ours, other
            elif against["method"] == "voco":
                if place > index and against["n"] != row["n"]:
                    yield ours, other
            elif against["method"] != "none":
                yield ours, other


def _paired(tables: dict[str, pa.Table], row: dict[str, Any], against: dict[str, Any]) -> Iterator[Difference]:
    """The difference over all questions, then by category for a variant. Raises Refused for questions that differ."""
    samples, categories, correct = join_correct(tables)
    label, other = row["label"], against["label"]
    wanted = [ALL]
    if against["method"] in VARIANTS and len(set(categories.tolist())) > 1:
        wanted += sorted(set(categories.tolist()))
    for category in wanted:
        chosen = np.ones(len(samples), dtype=bool) if category == ALL else categories == category
        held = {name: values[chosen] for name, values in correct.items()}
        drawn = bootstrap(held, samples[chosen], RESAMPLES, row["seed"] or 0)
        low, high = drawn.difference(label, other)
        value = drawn.scores[label] - drawn.scores[other]
        yield Difference(label, other, against["method"], category, value, low, high, int(chosen.sum()))


def difference_text(difference: Difference, whole: bool = False) -> str:
    """One sentence; `whole` names both methods and the number of questions."""
    points = f"{abs(100 * difference.value):.1f} points {'above' if difference.value > 0 else 'below'} {difference.other}"
    if difference.other_method in VARIANTS:
        points += f" for {difference.category} questions" if difference.category != ALL else ""
    interval = f"95 % interval of the paired difference {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    if whole:
        interval += f", over {difference.questions:,} questions"
    end = "" if difference.settled else "; zero is inside, so the order of the two is open"
    return f"{difference.label if whole else 'It'} is {points} ({interval}{end})."
