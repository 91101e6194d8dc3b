"""Which frames of a video are used: exact arithmetic, so that every machine chooses the same."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction


def frames_at_rate(ticks: Sequence[int], end: int, tick: Fraction, rate: float) -> list[int]:
    """Numbers of the frames that are visible 0, 1/rate, 2/rate ... seconds after the first, up to the video's end, each once.

    Frame k is visible from `ticks[k]` on, in units of `tick` seconds, and the last one until `end`. Containers round times to
    their tick, so the times that are asked for are rounded to it as well: at 30 frames a second Matroska says 67 ms for 66.7.
    """
    per_second = Fraction(rate).limit_denominator(100_000)
    numbers: list[int] = []
    for k in range(math.ceil((end - ticks[0]) * tick * per_second)):
        number = bisect.bisect_right(ticks, ticks[0] + round(k / per_second / tick)) - 1
        if not numbers or numbers[-1] < number:
            numbers.append(number)
    return numbers


def evenly_spaced(num_frames: int, count: int) -> list[int]:
    """Frame numbers in the middle of `count` equal parts, as Video-ChatGPT and LLaVA-Mini do; all frames when there are fewer."""
    count = min(count, num_frames)
    return [(2 * k + 1) * num_frames // (2 * count) for k in range(count)]


def thin_evenly(frames: list[int], limit: int) -> list[int]:
    """At most `limit` of the frames: when there are more, they are dropped evenly."""
    return frames if len(frames) <= limit else [frames[index] for index in evenly_spaced(len(frames), limit)]
