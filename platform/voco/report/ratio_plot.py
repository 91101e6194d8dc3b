"""What a compression keeps against how strong it is: one point a trial over the compression ratio, on a log axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from voco.report import plots

LABEL_HEIGHT = 15.0
LETTER = 7.0  # width of a letter, about
BESIDE = 9.0  # points of one ratio stand so far apart that their whiskers do not cover each other


@dataclass(frozen=True)
class Point:
    """One trial: its ratio V/N, a value in percent with its interval, and the series that it is joined to."""

    label: str
    series: str
    ratio: float
    value: float
    low: float | None
    high: float | None


class Note(NamedTuple):
    """A name at a place; `left`: it ends there."""

    x: float
    y: float
    words: str
    kind: str
    left: bool = False


def ratio_plot(title: str, y_label: str, points: Sequence[Point], bounds: Sequence[tuple[str, float]]) -> str:
    """Points with whiskers, those of one series joined; the bounds are dashed lines with their names.

    Raises ValueError without points, or for a ratio that is not above 0.
    """
    if not points or any(point.ratio <= 0 for point in points):
        raise ValueError("expected points with ratios above 0")
    height, left, right, top, bottom = 380.0, 62.0, 150.0, 18.0, 46.0
    values = [value for one in points for value in (one.value, one.low, one.high) if value is not None]
    values += [value for _, value in bounds]
    y_ticks = plots.nice_ticks(min(0.0, *values), max(values))
    first = math.floor(math.log2(min(one.ratio for one in points)) + 1e-9) - 1
    last = math.ceil(math.log2(max(one.ratio for one in points)) - 1e-9) + 1

    def across(ratio: float) -> float:
        return left + (math.log2(ratio) - first) / (last - first) * (plots.WIDTH - left - right)

    def down(value: float) -> float:
        return height - bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (height - top - bottom)

    end = plots.WIDTH - right
    parts = []
    for tick in y_ticks:
        y = down(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(plots.svg_text(left - 8, y + 4, f"{tick:g}", "end"))
    for power in range(first, last + 1, max(1, math.ceil((last - first) / 9))):
        x = across(2.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{height - bottom}" y2="{height - bottom + 5}"/>')
        parts.append(plots.svg_text(x, height - bottom + 19, f"{2.0**power:g}", "middle"))
    parts.append(plots.svg_text((left + end) / 2, height - 8, "compression ratio V/N, log scale", "middle", "axis"))
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(14 {(height - bottom + top) / 2}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    for _, value in bounds:
        y = down(value)
        parts.append(f'<line class="bound" x1="{left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
    series = list(dict.fromkeys(one.series for one in points))
    places = [across(one.ratio) + offset for one, offset in zip(points, _offsets(points), strict=True)]
    parts += _lines(points, places, series, down)
    notes = [Note(end + 6, down(value) + 4, name, "note") for name, value in bounds]
    for one, x in zip(points, places, strict=True):
        colour = series.index(one.series) % plots.COLOURS
        if one.low is not None and one.high is not None:
            low, high = down(one.low), down(one.high)
            caps = "".join(f"M{x - 5:.1f} {y:.1f}h10" for y in (low, high))
            parts.append(f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}{caps}"/>')
        parts.append(f'<circle class="c{colour}" cx="{x:.1f}" cy="{down(one.value):.1f}" r="5.5"/>')
        same = [place for place, other in zip(places, points, strict=True) if math.isclose(other.ratio, one.ratio)]
        alone = len(same) == 1 or x > min(same)  # the first of several is named on its left, the others on the right of all
        # beside the line of a series, which mostly falls from left to right
        notes.append(
            Note(max(same) + 9 if alone else x - 9, down(one.value) + (-5 if alone else 15), one.label, "value", not alone)
        )
    return plots.svg_document(title, height, parts + _labels(notes))


def _offsets(points: Sequence[Point]) -> list[float]:
    """How far each point stands beside its ratio: those of one ratio share the place around it."""
    found = []
    for index, one in enumerate(points):
        same = [at for at, other in enumerate(points) if math.isclose(other.ratio, one.ratio)]
        found.append(BESIDE * (same.index(index) - (len(same) - 1) / 2))
    return found


def _lines(points: Sequence[Point], places: list[float], series: list[str], down: Callable[[float], float]) -> list[str]:
    """A line through each series that has several ratios, unless one of them has two points: it would run up and down."""
    made = []
    for colour, name in enumerate(series):
        mine = sorted((one.ratio, x, down(one.value)) for one, x in zip(points, places, strict=True) if one.series == name)
        if len(mine) > 1 and len({ratio for ratio, _, _ in mine}) == len(mine):
            corners = " ".join(f"{x:.1f},{y:.1f}" for _, x, y in mine)
            made.append(f'<polyline class="joined s{colour % plots.COLOURS}" points="{corners}"/>')
    return made


def _labels(notes: list[Note]) -> list[str]:
    """Names beside their points, moved down where they would lie on one another."""
    made: list[str] = []
    taken: list[tuple[float, float, float]] = []  # left, right, baseline
    for note in sorted(notes, key=lambda note: note.y):
        wide = LETTER * len(note.words)
        near = note.x - wide if note.left else note.x
        at = note.y
        while any(abs(at - line) < LABEL_HEIGHT and near < far and close < near + wide for close, far, line in taken):
            at += 1.0
        taken.append((near, near + wide, at))
        made.append(plots.svg_text(note.x, at, note.words, "end" if note.left else "start", note.kind))
    return made
