"""Training section: a plot of loss curves per kind of run, and one table of all runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from voco.job.spec import STAGES
from voco.report import plots
from voco.report.outputs import Output, OutputGraph
from voco.store import parquet, schemas, storage


@dataclass(frozen=True)
class TrainingRun:
    """The figures of one training run; without metrics it has no steps."""

    output: Output
    group: str
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None

    @property
    def rate(self) -> float | None:
        """Supervised tokens per second of time in steps."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def training_section(graph: OutputGraph) -> dict[str, Any]:
    """The template's values: `groups` with a title, a plot and a legend per kind of run and per sweep, and a row per run."""
    runs: list[TrainingRun] = []
    curves: dict[str, list[plots.Curve]] = {}
    for output, group, name in _runs(graph):
        uri = storage.join(output.uri, schemas.METRICS_FILE)
        metrics = parquet.read_table(uri).sort_by("step") if storage.exists(uri) else None
        if metrics is None or metrics.num_rows == 0:
            runs.append(TrainingRun(output, group))
            continue
        curve = plots.Curve(name, metrics["step"].to_numpy().astype(float), metrics["loss"].to_numpy().astype(float))
        curves.setdefault(group, []).append(curve)
        mean = plots.smooth(curve.y)
        tokens, seconds = sum(metrics["tokens"].drop_null().to_pylist()), sum(metrics["seconds"].drop_null().to_pylist())
        runs.append(TrainingRun(output, group, metrics.num_rows, float(mean[0]), float(mean[-1]), int(tokens), float(seconds)))
    groups = [
        {
            "title": title,
            "plot": Markup(plots.curves(f"{title}: training loss by step", lines, "step", "loss per supervised token")),
            "legend": [line.label for line in lines],
        }
        for title, lines in curves.items()
    ]
    return {"runs": runs, "groups": groups}


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
