"""Adaptive N: the threshold keeps a budget, and an answer is that of the reading at which the model was sure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from voco.errors import Refused
from voco.evaluate.adaptive import AdaptiveReading, choose_threshold, held_out_margins, last_readings, mean_cost
from voco.model.sampling import GREEDY, NotedMargin, Sampling

SIZES = (1, 2, 4, 8)


def cost_of(margins: list[float], sizes: tuple[int, ...], threshold: float) -> int:
    """The obvious form: one question, one reading after the other."""
    cost = 0
    for margin, n in zip(margins, sizes, strict=True):
        cost += n
        if margin >= threshold:
            return cost
    return cost


def test_costs_are_those_of_reading_one_size_after_the_other() -> None:
    margins = np.random.default_rng(0).random((200, len(SIZES)))
    for threshold in (0.0, 0.3, 0.9, 1.1):
        expected = [cost_of(list(row), SIZES, threshold) for row in margins]
        assert mean_cost(margins, SIZES, threshold) == pytest.approx(np.mean(expected))
        reading = AdaptiveReading(SIZES, threshold)
        for row, last in zip(margins, last_readings(margins, threshold), strict=True):
            sure = [reading.is_sure(float(margin), n) for margin, n in zip(row, SIZES, strict=True)]
            assert sure.index(True) == last


@pytest.mark.parametrize("budget", [1.0, 1.3, 2.0, 3.7, 8.0, 14.9, 15.0, 99.0])
def test_the_threshold_is_the_largest_within_the_budget(budget: float) -> None:
    """Against trying every margin. Margins repeat, as those of a small vocabulary do."""
    margins = np.random.default_rng(1).integers(0, 30, (150, len(SIZES))) / 30
    threshold = choose_threshold(margins, SIZES, budget)
    tried = [*np.unique(margins[:, :-1]).tolist(), np.inf]
    assert threshold == max(t for t in tried if mean_cost(margins, SIZES, t) <= budget)
    assert mean_cost(margins, SIZES, threshold) <= budget


def test_a_budget_below_the_smallest_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected at least the smallest N, 2, got 1"):
        choose_threshold(np.ones((3, 2)), (2, 4), 1.0)


def answers(**changes: Any) -> pa.Table:
    """Answers to two questions about images and one without, at N = 2 and 1; in another order at each."""
    rows = []
    for n in (2, 1):
        for index in (0, 1, 2)[:: -1 if n == 1 else 1]:
            tokens = 0 if index == 2 else n
            rows.append(
                {"sample_id": f"s{index}", "conversation_index": 0, "n": n, "margin": index / 10 + n, "tokens_read": tokens}
            )
    return pa.Table.from_pylist([{**row, **changes} for row in rows])


def test_held_out_margins_are_joined_by_question() -> None:
    sizes, margins = held_out_margins(answers())
    assert sizes == (1, 2)
    assert margins == pytest.approx(np.array([[1.0, 2.0], [1.1, 2.1]]))


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (answers(margin=None), "with margins"),
        (answers(tokens_read=0), "about images or videos"),
        (answers().slice(1), "the same questions at every N"),
    ],
)
def test_answers_that_say_nothing_about_a_threshold_are_refused(table: pa.Table, line: str) -> None:
    with pytest.raises(Refused, match=f"inputs.calibration: .*{line}"):
        held_out_margins(table)


def test_the_margin_is_that_of_the_first_token_and_choices_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, 9, generator=generator) for _ in range(2))
    noted = NotedMargin()
    assert torch.equal(noted.choose(first, []), GREEDY.choose(first, []))
    assert torch.equal(noted.choose(second, []), GREEDY.choose(second, []))
    likeliest = first.softmax(dim=-1).sort(descending=True).values
    assert noted.margins == pytest.approx((likeliest[:, 0] - likeliest[:, 1]).tolist())
    drawn = NotedMargin(temperature=1.0, seed=3)
    assert torch.equal(drawn.choose(first, drawn.generators(3)), Sampling(1.0, seed=3).choose(first, drawn.generators(3)))
