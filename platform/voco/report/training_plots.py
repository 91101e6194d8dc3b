"""Plots of training runs by optimizer step: the loss, large, and a small plot of each further measure.

A run has the same colour and dash in all plots of its group. A dotted vertical line is where its workers started again.
Lengths are in view box units; all text is escaped in `plots`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from voco.report import plots
from voco.report.plots import COLOURS, Floats

LABEL_GAP = 150  # for the label of an interruption: labels that would overlap are left out


@dataclass(frozen=True)
class RunCurves:
    """Columns of one run by step: `columns` has (K,) each, NaN where a step has no value; `restarts` are the first steps of
    later attempts."""

    label: str
    step: Floats
    columns: dict[str, Floats]
    restarts: tuple[int, ...] = ()

    def points(self, column: str) -> tuple[Floats, Floats]:
        """Steps and values where the column has a value; both (k,)."""
        values = self.columns.get(column, np.full(len(self.step), np.nan))
        known = ~np.isnan(values)
        return self.step[known], values[known]


@dataclass(frozen=True)
class Measure:
    """A column with its title, and the factor from its unit to the title's."""

    column: str
    title: str
    factor: float = 1.0
    from_zero: bool = True
    sparse: bool = False  # few steps have a value: drawn as points


MEASURES = (
    Measure("samples_per_s", "samples/s"),
    Measure("tokens_per_s", "tokens/s"),
    Measure("mfu", "MFU, %", 100),
    Measure("wait_share", "waiting for data, %", 100),
    Measure("memory_bytes", "memory of a worker, GiB", 2.0**-30),
    Measure("grad_norm", "gradient norm"),
    Measure("voco_norm", "norm of <voco>", from_zero=False),
    Measure("val_score", "validation score, %", 100, sparse=True),
)


@dataclass(frozen=True)
class Axes:
    """The box that data are drawn in, and its ticks, of which the first and the last are at its ends."""

    left: float
    right: float
    top: float
    bottom: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def x(self, value: float) -> float:
        """A step's place from the left."""
        return self.left + (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0]) * (self.right - self.left)

    def y(self, value: float) -> float:
        """A value's place from the top; a value above the last tick is at the last tick."""
        share = (min(value, self.y_ticks[-1]) - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return self.bottom - share * (self.bottom - self.top)

    def points(self, x: Floats, y: Floats) -> str:
        """The `points` of a polyline."""
        return " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in zip(x, y, strict=True))


def loss_plot(title: str, runs: Sequence[RunCurves]) -> str:
    """The losses of a group's runs: pale raw points, their strong running mean, and circles of the validation's loss."""
    height, left, right, top, bottom = 336, 58, 30, 30, 42
    training = np.concatenate([run.points("loss")[1] for run in runs])
    validation = np.concatenate([run.points("val_loss")[1] for run in runs])
    # The axis ends at the 99.5th percentile of raw points, so that an outlier in the first steps does not flatten the rest.
    high = max([float(np.quantile(training, 0.995)), *validation])
    low = min([float(np.min(training)), *validation])
    x_ticks, y_ticks = plots.nice_ticks(0, _last_step(runs)), plots.nice_ticks(low, high)
    axes = Axes(left, plots.WIDTH - right, top, height - bottom, x_ticks, y_ticks)
    parts = _axis_parts(axes, lambda tick: f"{tick:g}")
    parts += [plots.svg_text(axes.x(tick), axes.bottom + 18, f"{tick:,g}", "middle") for tick in axes.x_ticks]
    parts.append(plots.svg_text((left + plots.WIDTH - right) / 2, height - 6, "step", "middle", "axis"))
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(14 {(height - bottom + top) / 2}) rotate(-90)">'
        f"{escape('loss per supervised token')}</text>"
    )
    parts += _restarts(axes, runs, labelled=True)
    for index, run in enumerate(runs):
        parts += _lines(axes, *run.points("loss"), index, 400)
        parts += _circles(axes, *run.points("val_loss"), index)
    return plots.svg_document(title, height, parts)


def small_plots(group: str, runs: Sequence[RunCurves]) -> list[str]:
    """A small plot of each measure that any of the runs has."""
    return [
        _small_plot(f"{group}: {measure.title} by step", measure, runs)
        for measure in MEASURES
        if any(len(run.points(measure.column)[0]) for run in runs)
    ]


def _small_plot(title: str, measure: Measure, runs: Sequence[RunCurves]) -> str:
    """One measure of all runs, with its title above the plot."""
    width, height, left, right, top, bottom = 250, 150, 44, 14, 28, 22
    values = np.concatenate([run.points(measure.column)[1] for run in runs]) * measure.factor
    low = 0.0 if measure.from_zero else float(np.min(values))
    high = float(np.max(values) if measure.sparse else np.quantile(values, 0.995)) or 1.0  # of a share that is 0 throughout
    last = _last_step(runs)
    axes = Axes(left, width - right, top, height - bottom, (0.0, max(last, 1.0)), plots.nice_ticks(low, high, 3))
    parts = [plots.svg_text(8, 14, measure.title, "start", "title"), *_axis_parts(axes, _short_number)]
    parts += [plots.svg_text(left, height - 6, "0", "start"), plots.svg_text(width - right, height - 6, f"{last:,g}", "end")]
    parts += _restarts(axes, runs)
    for index, run in enumerate(runs):
        steps, own = run.points(measure.column)
        scaled = own * measure.factor
        parts += _circles(axes, steps, scaled, index) if measure.sparse else _lines(axes, steps, scaled, index, 150)
    return plots.svg_document(title, height, parts, width, "small-plot")


def _last_step(runs: Sequence[RunCurves]) -> float:
    return max(float(run.step.max()) for run in runs)


def _axis_parts(axes: Axes, text: Callable[[float], str]) -> list[str]:
    """Horizontal lines with their values."""
    parts = []
    for tick in axes.y_ticks:
        y = axes.y(tick)
        parts.append(f'<line class="grid" x1="{axes.left}" x2="{axes.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(plots.svg_text(axes.left - 8, y + 4, text(tick), "end"))
    return parts


def _restarts(axes: Axes, runs: Sequence[RunCurves], labelled: bool = False) -> list[str]:
    """A dotted line where workers started again, between the last step before and the first after."""
    parts = []
    free = -math.inf
    for step, index in sorted((step, index) for index, run in enumerate(runs) for step in run.restarts):
        x = axes.x(step - 0.5)
        line = f'<line class="restart s{index % COLOURS}" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.top}" y2="{axes.bottom}">'
        parts.append(f"{line}<title>{escape(runs[index].label)}: started again at step {step:,}</title></line>")
        anchor, start = ("start", x) if x <= axes.right - LABEL_GAP else ("end", x - LABEL_GAP)
        if labelled and start >= free:
            parts.append(plots.svg_text(x, axes.top - 8, f"started again at {step:,}", anchor, "note"))
            free = start + LABEL_GAP
    return parts


def _lines(axes: Axes, x: Floats, y: Floats, index: int, limit: int) -> list[str]:
    """The raw values and their running mean, at most `limit` points each."""
    parts = []
    if len(x):
        for kind, values in (("raw", y), ("mean", plots.smooth(y))):
            points = axes.points(*plots.downsample(x, values, limit))
            parts.append(f'<polyline class="{kind} s{index % COLOURS}" points="{points}"/>')
    return parts


def _circles(axes: Axes, x: Floats, y: Floats, index: int) -> list[str]:
    """Values of few steps, joined."""
    if not len(x):
        return []
    joined = f'<polyline class="joined s{index % COLOURS}" points="{axes.points(x, y)}"/>'
    circle = f'<circle class="hollow s{index % COLOURS}" cx="%.1f" cy="%.1f" r="3.5"/>'
    return [joined, *(circle % (axes.x(a), axes.y(b)) for a, b in zip(x, y, strict=True))]


def _short_number(value: float) -> str:
    """A tick in at most five characters: 1.5k, 20M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
