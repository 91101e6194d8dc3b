"""Which frames of a video are used: exact arithmetic, so that every machine chooses the same."""

from __future__ import annotations

import math
from fractions import Fraction


def frames_at_rate(num_frames: int, fps: float, rate: float) -> list[int]:
    """Frame numbers at times 0, 1/rate, 2/rate ... of a video of `num_frames` at `fps` frames per second.

    The k-th is the frame visible at k/rate seconds, floor(k fps / rate). At a rate above the video's, each frame is used once.
    """
    step = max(Fraction(fps).limit_denominator(100_000) / Fraction(rate).limit_denominator(100_000), Fraction(1))
    return [math.floor(k * step) for k in range(math.ceil(num_frames / step))]


def evenly_spaced(num_frames: int, count: int) -> list[int]:
    """Frame numbers in the middle of `count` equal parts, as Video-ChatGPT and LLaVA-Mini do; all frames when there are fewer."""
    count = min(count, num_frames)
    return [(2 * k + 1) * num_frames // (2 * count) for k in range(count)]


def thin_evenly(frames: list[int], limit: int) -> list[int]:
    """At most `limit` of the frames: when there are more, they are dropped evenly."""
    return frames if len(frames) <= limit else [frames[index] for index in evenly_spaced(len(frames), limit)]
