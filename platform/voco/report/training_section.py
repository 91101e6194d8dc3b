"""Training: loss curves by kind of run, each kind on axes of its own, and one table of all runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from voco.report import plots
from voco.report.outputs import Output, OutputGraph
from voco.store import parquet, storage

KINDS = {"align": "Alignment", "image_sft": "Image SFT", "video_sft": "Video SFT"}


@dataclass(frozen=True)
class TrainingRun:
    """One training run in figures; None where its metrics have none."""

    output: Output
    group: str
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None

    @property
    def rate(self) -> float | None:
        """Supervised tokens per second of the time in steps."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def training_section(world: OutputGraph) -> dict[str, Any]:
    """`groups`: (title, plot, legend) of each kind of run, those of a sweep's trials apart; `runs`: a row of each run."""
    runs: list[TrainingRun] = []
    lines: dict[str, list[plots.Curve]] = {}
    for output, group, name in _runs(world):
        place = storage.join(output.uri, "metrics.parquet")
        held = parquet.read_table(place).sort_by("step") if storage.exists(place) else None
        if held is None or held.num_rows == 0:
            runs.append(TrainingRun(output, group))
            continue
        curve = plots.Curve(name, held["step"].to_numpy().astype(float), held["loss"].to_numpy().astype(float))
        lines.setdefault(group, []).append(curve)
        mean = plots.smooth(curve.y)
        tokens, seconds = sum(held["tokens"].drop_null().to_pylist()), sum(held["seconds"].drop_null().to_pylist())
        runs.append(TrainingRun(output, group, held.num_rows, float(mean[0]), float(mean[-1]), int(tokens), float(seconds)))
    groups = [
        {
            "title": title,
            "plot": Markup(plots.curves(f"{title}: training loss by step", held, "step", "loss per supervised token")),
            "legend": [line.label for line in held],
        }
        for title, held in lines.items()
    ]
    return {"runs": runs, "groups": groups}


def _runs(world: OutputGraph) -> list[tuple[Output, str, str]]:
    """Training outputs with their group's title and their names: in the order of the kinds, then of each sweep's axes."""
    found = [(output, KINDS[kind], output.name) for kind in KINDS for output in world.of_kind(kind)]
    alone = [item for item in found if world.sweep_of(item[0].uri) is None]
    trials = [
        (output, f"Trials of the sweep {sweep.name}", name)
        for sweep in world.of_kind("sweep")
        for name, output in world.trials(sweep)
    ]
    cut = next((index for index, item in enumerate(alone) if item[0].kind == "video_sft"), len(alone))
    return alone[:cut] + trials + alone[cut:]
