"""Adaptive N: a question is read at the smallest N, and again at the next larger one while the model is unsure.

How sure it is: the margin of the first token, the probability of the likeliest one less that of the next. All readings count:
one that stops at the second of N = 1, 2, 4 costs 3 tokens of each view. The threshold is chosen on held-out questions for a mean
cost, never on the questions that are scored (docs/method.md, "Adaptive N").

Legend: Q questions, K numbers of tokens N, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from voco.errors import Refused

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class AdaptiveReading:
    """Up to which N questions are read."""

    sizes: tuple[int, ...]  # (K,)
    threshold: float  # of the margin: below it the next N is read too

    def is_sure(self, margin: float, n: int) -> bool:
        """Whether a question that was read at `n` with this margin is read no further."""
        return margin >= self.threshold or n == self.sizes[-1]


def last_readings(margins: Floats, threshold: float) -> Ints:
    """(Q,) which of the K readings of (Q, K) margins is the last: the first that reaches the threshold, or the largest N."""
    sure = margins >= threshold
    sure[:, -1] = True
    last: Ints = np.argmax(sure, axis=1)
    return last


def mean_cost(margins: Floats, sizes: Sequence[int], threshold: float) -> float:
    """<voco> tokens of a view that a question reads in all its readings, on average over (Q, K) margins."""
    return float(np.cumsum(sizes)[last_readings(margins, threshold)].mean())


def choose_threshold(margins: Floats, sizes: Sequence[int], budget: float) -> float:
    """The largest threshold whose mean cost on (Q, K) margins is at most `budget`.

    Raises ValueError for a budget below the smallest N, which every question reads.
    """
    if budget < sizes[0]:
        raise ValueError(f"expected at least the smallest N, {sizes[0]}, got {budget:g}")
    # costs grow with the threshold and change at margins only: at one of them, or above all
    candidates = np.unique(margins[:, :-1])
    low, high = 0, len(candidates)  # candidates below `low` are within the budget
    if mean_cost(margins, sizes, np.inf) <= budget:
        return float(np.inf)
    while low < high:
        middle = (low + high) // 2
        if mean_cost(margins, sizes, float(candidates[middle])) <= budget:
            low = middle + 1
        else:
            high = middle
    return float(candidates[low - 1]) if low else 0.0


def held_out_margins(answers: pa.Table) -> tuple[tuple[int, ...], Floats]:
    """The N of answers to the same questions, ascending, and the (Q, K) margins. Questions without views are left out.

    Raises Refused for answers without margins, and for other questions at one N than at another.
    """
    sizes = tuple(sorted(answers["n"].unique().to_pylist()))
    columns, questions = [], None
    for n in sizes:
        at_n = answers.filter(pc.equal(answers["n"], n)).sort_by(
            [("sample_id", "ascending"), ("conversation_index", "ascending")]
        )
        at_n = at_n.filter(pc.greater(at_n["tokens_read"], 0))
        if at_n["margin"].null_count or not at_n.num_rows:
            raise Refused("inputs.calibration: expected answers of a `voco` checkpoint about images or videos, with margins")
        keys = list(zip(at_n["sample_id"].to_pylist(), at_n["conversation_index"].to_pylist(), strict=True))
        if questions is not None and keys != questions:
            raise Refused("inputs.calibration: expected the same questions at every N; it is one evaluation with `tokens: [...]`")
        questions = keys
        columns.append(at_n["margin"].to_numpy())
    return sizes, np.stack(columns, axis=1).astype(np.float64)
