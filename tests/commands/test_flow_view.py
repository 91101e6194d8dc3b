"""The picture of a flow on a terminal, from the lines of its log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from voco.commands.flow_view import FlowView
from voco.job.load import load_job
from voco.job.spec import Job

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> Job:
    return load_job(str(ROOT / "jobs/demo/flow.yaml"))


def view_of(job: Job, height: int = 40) -> tuple[FlowView, io.StringIO]:
    shown = io.StringIO()
    return FlowView(job, Console(file=shown, width=120, height=height, force_terminal=True, color_system=None)), shown


def row(view: FlowView, stage: str) -> tuple[str, float, str]:
    task = next(task for task in view.progress.tasks if task.description == stage)
    return task.fields["mark"], round(task.percentage), task.fields["text"]


def test_bars_follow_units_steps_and_trials(demo: Job) -> None:
    view, _ = view_of(demo)
    assert row(view, "scenes") == ("·", 0, "ingest")
    view.feed("[3/20] scenes: ingest\nscenes: ingest as scenes-1a2b3c4d\nscenes: unit 3/12, 900 rows, 300 rows/s, 3 s le")
    assert row(view, "scenes") == ("▶", 0, "ingest"), "a line counts when it is complete"
    view.feed("ft\n")
    assert row(view, "scenes") == ("▶", 25, "900 rows, 300 rows/s, 3 s left")
    view.feed("[3/20] scenes: 4.1 s\n")
    assert row(view, "scenes") == ("✓", 100, "")
    view.feed("[12/20] sft: sweep\nvoco-1: step 50/100, loss 0.5\nnone-1: step 100/100, loss 0.4\n")
    mark, percentage, text = row(view, "sft")
    jobs = 4 + 5  # trainings, and their evaluations with the lower bound
    assert (mark, percentage, text) == ("▶", round(100 * 1.5 / jobs), "none-1: loss 0.4")


def test_a_trainings_figures_are_those_that_fit_beside_a_bar(demo: Job) -> None:
    view, _ = view_of(demo)
    figures = "loss 0.5000, 81.2 samples/s, 12,345 tokens/s, MFU 41.0%, 2 % waiting for data, gradient norm 1.2, 12 min left"
    view.feed(f"[12/20] sft: sweep\nvoco-1: step 50/100, {figures}\n")
    assert row(view, "sft")[2] == "voco-1: loss 0.5000, 81.2 samples/s, MFU 41.0%, 12 min left"


def test_answers_scores_and_errors_are_printed_and_nothing_else(demo: Job) -> None:
    view, shown = view_of(demo)
    lines = [
        "first-look: 'what is it?' -> 'red' (right: 'red')",
        "first-look: 61.0% of 128 questions, 16 images",
        "warning: slow disk",
    ]
    with view:
        view.feed("\n".join([*lines, "(RayTrainWorker pid=3) chatter", ""]))
    assert all(line in shown.getvalue() for line in lines)
    assert "chatter" not in shown.getvalue()


def test_a_small_terminal_shows_the_stages_around_the_current_one(demo: Job) -> None:
    view, _ = view_of(demo, height=10)
    with view:
        view.feed("[14/20] frames: frame_cache\n")
        visible = [task.description for task in view.progress.tasks if task.visible]
    assert len(visible) == 7
    assert "frames" in visible[2:5]
    assert "cc3m" not in visible
