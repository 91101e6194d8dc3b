"""The choice of frames: cases that can be counted by hand, and properties for the rest."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voco.video.sample_frames import evenly_spaced, frames_at_rate, thin_evenly


@pytest.mark.parametrize(
    ("num_frames", "fps", "rate", "expected"),
    [
        (32, 4.0, 1.0, [0, 4, 8, 12, 16, 20, 24, 28]),
        (10, 4.0, 2.0, [0, 2, 4, 6, 8]),
        (90, 29.97, 1.0, [0, 29, 59, 89]),  # floor of 29.97, 59.94, 89.91
        (5, 1.0, 4.0, [0, 1, 2, 3, 4]),  # more than the video has: each once
        (3, 0.5, 1.0, [0, 1, 2]),  # slower than a frame a second (LLaMA-VID's step is 0 here)
        (1, 25.0, 1.0, [0]),
    ],
)
@pytest.mark.parametrize("tick", [Fraction(1, 1000), Fraction(1, 90_000), Fraction(1, 15_360)], ids=str)
def test_frames_at_a_rate(num_frames: int, fps: float, rate: float, expected: list[int], tick: Fraction) -> None:
    """In every container: times are rounded to its tick."""
    *ticks, end = (7 + round(number / Fraction(fps).limit_denominator(1001) / tick) for number in range(num_frames + 1))
    assert frames_at_rate(ticks, end, tick, rate) == expected


def test_a_variable_rate_is_sampled_by_time() -> None:
    """90 frames in three seconds, then one a second: what is seen at each second, as the slow, obvious search finds it."""
    seconds = [number / 30 for number in range(90)] + [3.0 + number for number in range(9)]
    ticks = [round(1000 * second) for second in seconds]
    expected = [max(number for number, tick in enumerate(ticks) if tick <= 1000 * second) for second in range(12)]
    assert frames_at_rate(ticks, 12_000, Fraction(1, 1000), 1.0) == expected == [0, 30, 60, *range(90, 99)]


@pytest.mark.parametrize(
    ("num_frames", "count", "expected"), [(8, 4, [1, 3, 5, 7]), (8, 1, [4]), (3, 8, [0, 1, 2]), (10, 3, [1, 5, 8])]
)
def test_frames_in_the_middle_of_equal_parts(num_frames: int, count: int, expected: list[int]) -> None:
    assert evenly_spaced(num_frames, count) == expected


@given(st.integers(1, 5000), st.integers(1, 300))
def test_evenly_is_inside_and_in_order(num_frames: int, count: int) -> None:
    numbers = evenly_spaced(num_frames, count)
    assert len(numbers) == min(num_frames, count)
    assert numbers == sorted(set(numbers))
    assert 0 <= numbers[0] <= numbers[-1] < num_frames


@given(st.lists(st.integers(), min_size=1, max_size=200, unique=True), st.integers(1, 50))
def test_thinning_keeps_order_and_its_limit(frames: list[int], limit: int) -> None:
    thinned = thin_evenly(frames, limit)
    assert len(thinned) == min(limit, len(frames))
    indices = [frames.index(frame) for frame in thinned]
    assert indices == sorted(set(indices))
