"""The training section: what interruptions cost, means over time, plots of what was measured, and metrics of earlier runs."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report import report_world
from report.page_tags import Tags

from voco.report import html as report_html
from voco.report import training_plots
from voco.report.outputs import gather_outputs
from voco.report.training_plots import MEASURES, RunCurves
from voco.report.training_section import find_interruptions, read_curves, training_section
from voco.store import parquet, schemas

EARLIER = ("step", "epoch", "loss", "kl", "tokens", "cut", "sample_ids_sha256", "lr", "grad_norm", "seconds", "wait")


def metrics(**columns: Any) -> pa.Table:
    """Rows of metrics.parquet with these columns; the others are null."""
    rows = len(columns["step"])
    filled = {"tokens": [10] * rows, "loss": [1.0] * rows, "seconds": [1.0] * rows, **columns}
    return pa.table({name: filled.get(name, [None] * rows) for name in schemas.METRICS.names}, schema=schemas.METRICS)


def curves(label: str = "a", **columns: Any) -> RunCurves:
    return read_curves(label, metrics(**columns))


def shapes(svg: str, tag: str, kind: str) -> list[dict[str, str]]:
    """Attributes of the elements of one class."""
    tags = Tags(svg).tags
    plain = [(name, {key: value or "" for key, value in attributes.items()}) for name, attributes in tags]
    return [attributes for name, attributes in plain if name == tag and attributes.get("class", "").startswith(kind)]


def test_an_interruption_costs_the_time_between_two_steps_that_were_kept() -> None:
    """Steps 2 and 3 were done twice: only the second time is in the table, so its start is 40 s after step 1 ended."""
    table = curves(step=[0, 1, 2, 3, 4], attempt=[0, 0, 1, 1, 3], time=[100.0, 101.0, 142.0, 143.0, 160.0])
    interruptions = find_interruptions(table.columns)
    assert interruptions.count == 3  # the last attempt is the fourth start: one of them made no step that was kept
    assert interruptions.restarts == table.restarts == (2, 4)
    assert interruptions.seconds == (142 - 1 - 101) + (160 - 1 - 143)


@pytest.mark.parametrize(
    ("columns", "count", "seconds"),
    [
        ({"attempt": [0, 0, 0], "time": [1.0, 2.0, 3.0]}, 0, None),
        ({"attempt": [0, 1, 1]}, 1, None),  # when is not known
        ({}, 0, None),
        ({"attempt": [2, 2, 2], "time": [1.0, 2.0, 3.0]}, 2, None),  # before the first step that was kept
    ],
    ids=["none", "no times", "no attempts", "at the start"],
)
def test_what_is_not_known_of_an_interruption_is_not_said(columns: dict[str, Any], count: int, seconds: float | None) -> None:
    interruptions = find_interruptions(curves(step=[0, 1, 2], **columns).columns)
    assert (interruptions.count, interruptions.seconds) == (count, seconds)


def test_rates_are_means_over_time(tmp_path: Path) -> None:
    """A step of 9 s at 10 samples/s and 1 s at 100 samples/s are 190 samples in 10 s."""
    job = report_world.job(tmp_path, "a", "image_sft", **base_inputs(tmp_path))
    table = metrics(
        step=[0, 1], seconds=[9.0, 1.0], samples_per_s=[10.0, 100.0], wait=[4.5, 0.0], memory_bytes=[7, 5], mfu=[0.1, 0.3]
    )
    parquet.write_table(f"{job.output}/metrics.parquet", [table], schemas.METRICS)
    report_world.finish(job, 20.0)
    (run,) = training_section(gather_outputs([job.output]))["runs"]
    assert run.samples_per_s == pytest.approx(19.0)
    assert run.wait_share == pytest.approx(0.45)
    assert run.mfu == pytest.approx(0.12)
    assert run.memory_bytes == 7
    assert run.rate == pytest.approx(2.0)


def base_inputs(root: Path) -> dict[str, Any]:
    report_world.ingest(root)
    report_world.features(root)
    inputs = {"samples": [{"uri": str(root / "ingest-test")}], "features": str(root / "features-test")}
    model = {"llama": report_world.LLAMA, "tower": report_world.TOWER}
    return {"inputs": inputs, "model": model, "compression": {"method": "voco", "tokens": 1}, "image_sft": report_world.SFT}


def test_metrics_of_earlier_runs_still_have_a_section(tmp_path: Path) -> None:
    job = report_world.job(tmp_path, "a", "image_sft", **base_inputs(tmp_path))
    table = metrics(step=[0, 1, 2], wait=[0.0, 0.5, 0.0], grad_norm=[1.0, 2.0, 1.0]).select(EARLIER)
    parquet.write_table(f"{job.output}/metrics.parquet", [table], table.schema)
    report_world.finish(job, 20.0)
    section = training_section(gather_outputs([job.output]))
    (run,), (group,) = section["runs"], section["groups"]
    assert run.samples_per_s == pytest.approx(2.0)  # global_batch over the seconds of a step
    assert run.interruptions.count == 0
    assert section["shown"] == {"samples_per_s", "wait_share"}
    assert [Tags(plot).words.split(" by step")[0] for plot in group["small"]] == [
        "Image SFT: waiting for data, %", "Image SFT: gradient norm",
    ]  # fmt: skip
    page = report_html.render_page(gather_outputs([job.output]), "t")
    assert "interruptions" not in Tags(page).words


def test_every_measure_of_the_metrics_has_a_plot_and_others_none() -> None:
    columns = {measure.column for measure in MEASURES} - {"wait_share"}
    assert columns <= set(schemas.METRICS.names)
    values = {name: [1.0, 2.0] for name in columns - {"memory_bytes"}} | {"memory_bytes": [1 << 30, 2 << 30], "wait": [0.1, 0.2]}
    run = curves(step=[0, 1], **values)
    assert len(training_plots.small_plots("g", [run])) == len(MEASURES)
    bare = curves(step=[0, 1], grad_norm=[1.0, 2.0])
    (plot,) = training_plots.small_plots("g", [bare])
    assert len(shapes(plot, "polyline", "mean")) == 1
    both = training_plots.small_plots("g", [bare, run])
    assert [len(shapes(plot, "polyline", "mean")) for plot in both] == [1, 1, 1, 1, 1, 2, 1, 0]  # a colour stays its run's
    assert shapes(both[0], "polyline", "mean")[0]["class"] == "mean s1"


def test_interruptions_and_validations_are_drawn_at_their_steps() -> None:
    steps = 101
    loss = np.linspace(2, 1, steps)
    val = [1.5 if step in (50, 100) else None for step in range(steps)]
    run = curves(step=range(steps), loss=loss, attempt=[int(step >= 60) for step in range(steps)], val_loss=val)
    svg = training_plots.loss_plot("t", [run])
    (line,) = shapes(svg, "line", "restart")
    points = shapes(svg, "polyline", "raw")[0]["points"].split(" ")
    first, last = (float(points[index].split(",")[0]) for index in (0, -1))
    assert float(line["x1"]) == pytest.approx(first + (last - first) * 0.595, abs=0.2)  # between the steps 59 and 60
    circles = shapes(svg, "circle", "hollow")
    assert [float(circle["cx"]) for circle in circles] == pytest.approx([first + (last - first) * 0.5, last], abs=0.2)
    assert "started again at step 60" in Tags(svg).words


def test_labels_of_interruptions_do_not_overlap() -> None:
    steps = 1000
    attempt = np.searchsorted([100, 105, 110, 400, 990], np.arange(steps), side="right")
    svg = training_plots.loss_plot("t", [curves(step=range(steps), attempt=attempt)])
    assert len(shapes(svg, "line", "restart")) == 5
    labels = shapes(svg, "text", "note")
    starts = [float(item["x"]) - 130 * (item["text-anchor"] == "end") for item in labels]
    spans = [(start, start + 130) for start in starts]
    assert len(spans) == 3
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[0][0] >= 0
    assert spans[-1][1] <= 680


def test_a_share_that_is_zero_throughout_has_an_axis_from_zero() -> None:
    (plot,) = training_plots.small_plots("g", [curves(step=[0, 1, 2], wait=[0.0, 0.0, 0.0])])
    ticks = [float(text) for text in re.findall(r'text-anchor="end">([-\d.]+)<', plot)]
    assert min(ticks) == 0


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.25, "0.25"), (1500, "1.5k"), (2e7, "20M"), (3.2e9, "3.2G")])
def test_ticks_are_short(value: float, text: str) -> None:
    assert training_plots._short_number(value) == text


def test_the_table_says_what_interruptions_cost(tmp_path: Path) -> None:
    job = report_world.job(tmp_path, "a", "image_sft", **base_inputs(tmp_path))
    report_world.write_training(job, 0.5, 2.0, steps=400, restarts={200: 30.0, 300: 12.0})
    words = Tags(report_html.render_page(gather_outputs([job.output]), "t")).words
    assert "42.0 s lost" in words
    assert "lowest validation loss" in words
    assert "Dotted vertical lines: the workers started again" in words
