"""Training section: for each kind of run its losses and small plots of what else was measured, and one table of all runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from voco.job.spec import STAGES
from voco.report import plots, training_plots
from voco.report.outputs import Output, OutputGraph
from voco.report.plots import Floats
from voco.report.training_plots import RunCurves
from voco.store import parquet, schemas, storage


@dataclass(frozen=True)
class Interruptions:
    """Starts of a run's workers after the first, at which steps, and the seconds from a step that was kept to the next."""

    count: int = 0
    restarts: tuple[int, ...] = ()
    seconds: float | None = None  # of those between two kept steps; None where a step's time is not known


@dataclass(frozen=True)
class TrainingRun:
    """The figures of one training run; without metrics it has no steps."""

    output: Output
    group: str
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    val_loss: float | None = None  # the lowest
    val_step: int | None = None  # counted from 0: the loss is that after it
    tokens: int | None = None
    seconds: float | None = None
    samples_per_s: float | None = None
    mfu: float | None = None
    wait_share: float | None = None
    memory_bytes: float | None = None  # the most
    interruptions: Interruptions = field(default_factory=Interruptions)

    @property
    def rate(self) -> float | None:
        """Supervised tokens per second of time in steps."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def training_section(graph: OutputGraph) -> dict[str, Any]:
    """The template's values: `groups` with a title, plots and a legend per kind of run and per sweep, and a row per run."""
    runs: list[TrainingRun] = []
    curves: dict[str, list[RunCurves]] = {}
    for output, group, name in _runs(graph):
        uri = storage.join(output.uri, schemas.METRICS_FILE)
        metrics = parquet.read_table(uri).sort_by("step") if storage.exists(uri) else None
        if metrics is None or metrics.num_rows == 0:
            runs.append(TrainingRun(output, group))
            continue
        run_curves = read_curves(name, metrics)
        curves.setdefault(group, []).append(run_curves)
        runs.append(_training_run(output, group, run_curves))
    groups = [
        {
            "title": title,
            "plot": Markup(training_plots.loss_plot(f"{title}: training loss by step", lines)),
            "small": [Markup(plot) for plot in training_plots.small_plots(title, lines)],
            "legend": [line.label for line in lines],
            "restarted": any(line.restarts for line in lines),
            "validated": any(len(line.points("val_loss")[0]) for line in lines),
        }
        for title, lines in curves.items()
    ]
    columns = ("val_loss", "samples_per_s", "mfu", "wait_share", "memory_bytes")
    shown = {name for name in columns if any(getattr(run, name) is not None for run in runs)}
    shown |= {"interruptions"} if any(run.interruptions.count for run in runs) else set()
    return {"runs": runs, "groups": groups, "shown": shown}


def read_curves(label: str, metrics: pa.Table) -> RunCurves:
    """The columns of metrics.parquet, sorted by step. A column that the run lacks, as earlier runs do, has no values."""
    columns = {field.name: metrics[field.name].to_numpy().astype(float) for field in metrics.schema if field.type != pa.string()}
    if "wait" in columns:
        seconds = np.where(columns["seconds"] > 0, columns["seconds"], np.nan)
        columns["wait_share"] = columns["wait"] / seconds
    return RunCurves(label, columns["step"], columns, find_interruptions(columns).restarts)


def find_interruptions(columns: dict[str, Floats]) -> Interruptions:
    """Where `attempt` grows. What an interruption cost is the time from the last step that was kept to the start of the first
    step after it: steps that were done again, and the start of the workers."""
    attempt = columns.get("attempt", np.full(len(columns["step"]), np.nan))
    if np.isnan(attempt).any():
        return Interruptions()
    first = np.flatnonzero(np.diff(attempt) > 0) + 1
    restarts = tuple(int(step) for step in columns["step"][first])
    time = columns.get("time", np.full(len(attempt), np.nan))
    lost = float(np.sum(time[first] - columns["seconds"][first] - time[first - 1]))
    return Interruptions(int(attempt[-1]), restarts, None if np.isnan(lost) or not len(first) else max(lost, 0.0))


def _training_run(output: Output, group: str, curves: RunCurves) -> TrainingRun:
    columns = curves.columns
    seconds = float(np.nansum(columns["seconds"]))
    mean = plots.smooth(curves.points("loss")[1])
    val_steps, val_losses = curves.points("val_loss")
    best = int(np.argmin(val_losses)) if len(val_losses) else None
    _, memory = curves.points("memory_bytes")
    batch = (output.job.get(output.kind) or {}).get("global_batch")  # of runs without samples_per_s
    rate = _mean_by_time(columns, "samples_per_s")
    return TrainingRun(
        output,
        group,
        steps=len(curves.step),
        first_loss=float(mean[0]),
        last_loss=float(mean[-1]),
        val_loss=None if best is None else float(val_losses[best]),
        val_step=None if best is None else int(val_steps[best]),
        tokens=int(np.nansum(columns["tokens"])),
        seconds=seconds,
        samples_per_s=batch * len(curves.step) / seconds if rate is None and batch and seconds else rate,
        mfu=_mean_by_time(columns, "mfu"),
        wait_share=_mean_by_time(columns, "wait_share"),
        memory_bytes=float(np.max(memory)) if len(memory) else None,
        interruptions=find_interruptions(columns),
    )


def _mean_by_time(columns: dict[str, Floats], name: str) -> float | None:
    """The mean of a column, each step weighted by its seconds; None where no step has a value."""
    values, weights = columns.get(name, np.full(len(columns["step"]), np.nan)), columns["seconds"]
    known = ~np.isnan(values) & (weights > 0)
    return float(np.average(values[known], weights=weights[known])) if known.any() else None


def _runs(graph: OutputGraph) -> list[tuple[Output, str, str]]:
    """(training output, title of its group, its name), in the order of STAGES; trials of sweeps are before video SFT."""
    titles = {kind: stage.title for kind, stage in STAGES.items() if stage.trains}
    runs = [(output, title, output.name) for kind, title in titles.items() for output in graph.of_kind(kind)]
    single = [run for run in runs if graph.sweep_of(run[0].uri) is None]
    trials = [
        (output, f"Trials of the sweep {sweep.name}", name)
        for sweep in graph.of_kind("sweep")
        for name, output in graph.trials(sweep)
    ]
    cut = next((index for index, run in enumerate(single) if run[0].kind == "video_sft"), len(single))
    return single[:cut] + trials + single[cut:]
