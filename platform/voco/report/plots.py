"""Plots as inline SVG. Colours are classes (`c0`, `c1`, ...) of the page's style sheet, which has a light and a dark theme.

All text is escaped here. Lengths are in view box units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COLOURS = 8  # classes in the style sheet
WIDTH = 680


@dataclass(frozen=True)
class Bar:
    """One value in percent with its interval. `muted`: grey, for a bound."""

    label: str
    value: float
    low: float | None
    high: float | None
    muted: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high`."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]


def smooth(y: Floats, share: float = 0.03) -> Floats:
    """Centred running mean over `share` of the points (at least three); the window is cut off at both ends."""
    half = max(1, round(len(y) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(y)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    means: Floats = (sums[high] - sums[low]) / (high - low)
    return means


def downsample(x: Floats, y: Floats, limit: int = 400) -> tuple[Floats, Floats]:
    """At most `limit` points, each the mean of consecutive points."""
    if len(x) <= limit:
        return x, y
    cuts = np.linspace(0, len(x), limit + 1).astype(int)[:-1]
    sizes = np.diff(np.append(cuts, len(x)))
    return np.add.reduceat(x, cuts) / sizes, np.add.reduceat(y, cuts) / sizes


def bars(title: str, items: Sequence[Bar], bounds: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars with whiskers, from 0 %; the bounds are dashed lines across all bars."""
    left, right, top, row = 210, 92, 26, 36
    height = top + row * len(items) + 34
    values = [value for item in items for value in (item.value, item.high or 0)] + [value for _, value in bounds]
    ticks = nice_ticks(0, max(values))

    def x_of(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - left - right)

    parts = [f'<line class="grid" x1="{x_of(t):.1f}" x2="{x_of(t):.1f}" y1="{top}" y2="{height - 30}"/>' for t in ticks]
    parts += [svg_text(x_of(tick), height - 14, f"{tick:g} %", "middle") for tick in ticks]
    colour = 0
    foreground = []  # drawn over the lines of the bounds
    for index, item in enumerate(items):
        y = top + row * index + 7
        width = max(x_of(item.value) - x_of(0), 0)
        kind = "muted" if item.muted else f"c{colour % COLOURS}"
        colour += not item.muted
        parts.append(svg_text(left - 10, y + 15, truncate(item.label, 30), "end", "name"))
        parts.append(f'<rect class="bar {kind}" x="{x_of(0):.1f}" y="{y}" width="{width:.1f}" height="22" rx="2"/>')
        end = item.value
        if item.low is not None and item.high is not None:
            foreground.append(whisker(x_of(item.low), x_of(item.high), y + 11))
            end = max(end, item.high)
        foreground.append(svg_text(max(x_of(end), x_of(item.value)) + 8, y + 16, f"{item.value:.1f} %", "start", "value"))
    for name, value in bounds:
        x = x_of(value)
        parts.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 30}"/>')
        parts.append(svg_text(x, top - 11, name, "middle", "note"))
    return svg_document(title, height, parts + foreground)


def dots(title: str, groups: Sequence[tuple[str, Sequence[Bar], Sequence[tuple[str, float]]]]) -> str:
    """A group of dots with whiskers per category; the category's own bounds are dashed lines across its group."""
    longest = max(len(name) for name, _, _ in groups)
    left, right, top, row, gap = max(150, 24 + 8 * min(longest, 22)), 60, 8, 15, 16
    heights = [row * len(items) + gap for _, items, _ in groups]
    height = top + sum(heights) + 30
    values = [v for _, items, bounds in groups for v in [*(item.high or item.value for item in items), *(b for _, b in bounds)]]
    ticks = nice_ticks(0, max(values))

    def x_of(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - left - right)

    parts = [f'<line class="grid" x1="{x_of(t):.1f}" x2="{x_of(t):.1f}" y1="{top}" y2="{height - 28}"/>' for t in ticks]
    parts += [svg_text(x_of(tick), height - 12, f"{tick:g} %", "middle") for tick in ticks]
    y = float(top)
    for (name, items, bounds), group_height in zip(groups, heights, strict=True):
        middle = y + group_height / 2
        parts.append(svg_text(left - 12, middle + 4, truncate(name, 22), "end", "name"))
        for _, value in bounds:
            x = x_of(value)
            parts.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 4:.1f}" y2="{y + group_height - 4:.1f}"/>')
        for index, item in enumerate(items):
            centre = y + gap / 2 + row * (index + 0.5)
            if item.low is not None and item.high is not None:
                parts.append(whisker(x_of(item.low), x_of(item.high), centre, 3))
            parts.append(f'<circle class="c{index % COLOURS}" cx="{x_of(item.value):.1f}" cy="{centre:.1f}" r="5"/>')
            end = item.value if item.high is None else max(item.high, item.value)
            parts.append(svg_text(x_of(end) + 8, centre + 4, f"{item.value:.1f}", "start", "small"))
        y += group_height
        parts.append(f'<line class="grid" x1="8" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return svg_document(title, height, parts)


def whisker(low: float, high: float, y: float, cap: float = 5) -> str:
    """A horizontal interval with caps of half height `cap`."""
    ends = "".join(f"M{x:.1f} {y - cap:.1f}v{2 * cap}" for x in (low, high))
    return f'<path class="whisker" d="M{low:.1f} {y:.1f}H{high:.1f}{ends}"/>'


def truncate(text: str, length: int) -> str:
    """At most `length` characters; a longer text ends with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def svg_text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    """A text element of class `kind`, escaped."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def svg_document(title: str, height: float, parts: list[str], width: float = WIDTH, kind: str = "plot") -> str:
    """A complete SVG element of `width` x `height` and of class `kind`."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
