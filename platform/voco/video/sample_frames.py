"""Which frames of a video are taken: integer arithmetic only."""

from __future__ import annotations

import math
from fractions import Fraction


def frames_at_rate(num_frames: int, fps: float, wanted: float) -> list[int]:
    """Frame numbers at times 0, 1/wanted, 2/wanted ... of a video of `num_frames` at `fps` frames per second.

    The k-th is the frame shown at k/wanted seconds, floor(k fps / wanted). Asked for more than the video has, every frame is
    taken once.
    """
    step = max(Fraction(fps).limit_denominator(100_000) / Fraction(wanted).limit_denominator(100_000), Fraction(1))
    return [math.floor(k * step) for k in range(math.ceil(num_frames / step))]


def evenly_spaced(num_frames: int, count: int) -> list[int]:
    """Frame numbers in the middle of `count` equal parts, as Video-ChatGPT and LLaVA-Mini take them; all when there are fewer."""
    count = min(count, num_frames)
    return [(2 * k + 1) * num_frames // (2 * count) for k in range(count)]


def thin_evenly(frames: list[int], limit: int) -> list[int]:
    """At most `limit` of the frames: when there are more, they are dropped evenly."""
    return frames if len(frames) <= limit else [frames[at] for at in evenly_spaced(len(frames), limit)]
