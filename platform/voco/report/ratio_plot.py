"""Score or retention against compression ratio: one point per trial, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from voco.report import plots

LABEL_HEIGHT = 15.0
LETTER_WIDTH = 7.0  # approximate
POINT_GAP = 9.0  # between points of equal ratio, so that their whiskers do not overlap


@dataclass(frozen=True)
class RatioPoint:
    """One trial: its ratio V/N, a value in percent with its interval, and the series that it belongs to."""

    label: str
    series: str
    ratio: float
    value: float
    low: float | None
    high: float | None


class PointLabel(NamedTuple):
    """Text that starts at (x, y), or ends there when `left` is true."""

    x: float
    y: float
    text: str
    kind: str
    left: bool = False


def ratio_plot(title: str, y_label: str, points: Sequence[RatioPoint], bounds: Sequence[tuple[str, float]]) -> str:
    """Points with whiskers and a line through each series; the bounds are dashed lines with their names.

    Raises ValueError without points, or for a ratio that is not above 0.
    """
    if not points or any(point.ratio <= 0 for point in points):
        raise ValueError("expected points with ratios above 0")
    height, left, right, top, bottom = 380.0, 62.0, 150.0, 18.0, 46.0
    values = [value for point in points for value in (point.value, point.low, point.high) if value is not None]
    values += [value for _, value in bounds]
    y_ticks = plots.nice_ticks(min(0.0, *values), max(values))
    first = math.floor(math.log2(min(point.ratio for point in points)) + 1e-9) - 1
    last = math.ceil(math.log2(max(point.ratio for point in points)) - 1e-9) + 1

    def x_of(ratio: float) -> float:
        return left + (math.log2(ratio) - first) / (last - first) * (plots.WIDTH - left - right)

    def y_of(value: float) -> float:
        return height - bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (height - top - bottom)

    end = plots.WIDTH - right
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(plots.svg_text(left - 8, y + 4, f"{tick:g}", "end"))
    for power in range(first, last + 1, max(1, math.ceil((last - first) / 9))):
        x = x_of(2.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{height - bottom}" y2="{height - bottom + 5}"/>')
        parts.append(plots.svg_text(x, height - bottom + 19, f"{2.0**power:g}", "middle"))
    parts.append(plots.svg_text((left + end) / 2, height - 8, "compression ratio V/N, log scale", "middle", "axis"))
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(14 {(height - bottom + top) / 2}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    for _, value in bounds:
        y = y_of(value)
        parts.append(f'<line class="bound" x1="{left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
    series = list(dict.fromkeys(point.series for point in points))
    point_xs = [x_of(point.ratio) + offset for point, offset in zip(points, _offsets(points), strict=True)]
    parts += _lines(points, point_xs, series, y_of)
    labels = [PointLabel(end + 6, y_of(value) + 4, name, "note") for name, value in bounds]
    for point, x in zip(points, point_xs, strict=True):
        colour = series.index(point.series) % plots.COLOURS
        if point.low is not None and point.high is not None:
            low, high = y_of(point.low), y_of(point.high)
            caps = "".join(f"M{x - 5:.1f} {y:.1f}h10" for y in (low, high))
            parts.append(f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}{caps}"/>')
        y = y_of(point.value)
        parts.append(f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>')
        same_ratio = [other_x for other_x, other in zip(point_xs, points, strict=True) if math.isclose(other.ratio, point.ratio)]
        # Of several points with one ratio, the first has its label on the left, the others right of all of them. Labels are
        # above or below the line of a series, which mostly falls from left to right.
        if len(same_ratio) > 1 and x == min(same_ratio):
            labels.append(PointLabel(x - 9, y + 15, point.label, "value", left=True))
        else:
            labels.append(PointLabel(max(same_ratio) + 9, y - 5, point.label, "value"))
    return plots.svg_document(title, height, parts + _labels(labels))


def _offsets(points: Sequence[RatioPoint]) -> list[float]:
    """Horizontal shift of each point: points of equal ratio are spread evenly around it."""
    offsets = []
    for index, point in enumerate(points):
        same_ratio = [position for position, other in enumerate(points) if math.isclose(other.ratio, point.ratio)]
        offsets.append(POINT_GAP * (same_ratio.index(index) - (len(same_ratio) - 1) / 2))
    return offsets


def _lines(points: Sequence[RatioPoint], point_xs: list[float], series: list[str], y_of: Callable[[float], float]) -> list[str]:
    """A line through each series of several points; none where two points share a ratio, because it would zigzag."""
    lines = []
    for colour, name in enumerate(series):
        line = sorted(
            (point.ratio, x, y_of(point.value)) for point, x in zip(points, point_xs, strict=True) if point.series == name
        )
        if len(line) > 1 and len({ratio for ratio, _, _ in line}) == len(line):
            corners = " ".join(f"{x:.1f},{y:.1f}" for _, x, y in line)
            lines.append(f'<polyline class="joined s{colour % plots.COLOURS}" points="{corners}"/>')
    return lines


def _labels(labels: list[PointLabel]) -> list[str]:
    """The labels from top to bottom, each moved down until it overlaps no other."""
    texts: list[str] = []
    boxes: list[tuple[float, float, float]] = []  # left, right, baseline
    for label in sorted(labels, key=lambda label: label.y):
        width = LETTER_WIDTH * len(label.text)
        left = label.x - width if label.left else label.x
        y = label.y
        while any(abs(y - base) < LABEL_HEIGHT and left < end and start < left + width for start, end, base in boxes):
            y += 1.0
        boxes.append((left, left + width, y))
        texts.append(plots.svg_text(label.x, y, label.text, "end" if label.left else "start", label.kind))
    return texts
