"""Rows hold every sample once, are full, and do not depend on anything but the lengths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voco.train.packing import pack, split_by_tokens, split_evenly


def llava_like(count: int, seed: int = 0) -> list[int]:
    """579 tokens of an image and its <voco> before lognormal text, mean 171, as in the anchors; 6 % text only."""
    draw = np.random.default_rng(seed)
    text = np.clip(draw.lognormal(np.log(171) - 0.5 * 0.8**2, 0.8, count), 8, 1460).astype(int)
    return (text + np.where(draw.random(count) < 0.94, 579, 0)).tolist()


@pytest.mark.parametrize(("capacity", "fill"), [(4096, 0.95), (8192, 0.98)])
def test_rows_of_llava_like_samples_are_full(capacity: int, fill: float) -> None:
    lengths = llava_like(66_000)
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= capacity
    assert sum(lengths) / (len(rows) * capacity) >= fill


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_no_row_is_too_long_and_none_could_be_joined_with_another(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(total <= capacity or len(row) == 1 for row in rows for total in [sum(lengths[index] for index in row)])
    assert len(sums) < 2 or sums[0] + sums[1] > capacity


@given(st.lists(st.integers(1, 50), max_size=6), st.integers(1, 3))
def test_samples_are_dealt_nearly_as_evenly_as_possible(lengths: list[int], count: int) -> None:
    rows = split_evenly(lengths, count)
    assert len(rows) == count
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    ways = itertools.product(range(count), repeat=len(lengths))
    best = min(max(sum(x for x, row in zip(lengths, way, strict=True) if row == at) for at in range(count)) for way in ways)
    assert max(sum(lengths[index] for index in row) for row in rows) <= 13 / 11 * best


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_no_row_has_more_tokens_than_the_budget(lengths: list[int], tokens: int) -> None:
    rows = split_by_tokens(lengths, tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= tokens or len(row) == 1 for row in rows)
    assert len(rows) <= len(pack(lengths, tokens))


def test_rows_of_a_budget_are_nearly_equal() -> None:
    lengths = llava_like(64)
    sums = [sum(lengths[index] for index in row) for row in split_by_tokens(lengths, 8192)]
    assert len(sums) == len(pack(lengths, 8192)) == -(-sum(lengths) // 8192)
    assert max(sums) - min(sums) < 0.02 * max(sums)
