"""The lines that a run prints about its steps, and what a resumed run decides from its metrics."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from voco.run.logs import TRAINING_STEP
from voco.sequence.sequence import build_sample
from voco.train import watch as train_watch
from voco.train.batches import StepData
from voco.train.watch import StepWatch


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []
    monkeypatch.setattr(train_watch, "log", SimpleNamespace(info=lambda text, *values: written.append(text % values)))
    return written


def watch_of(**values: Any) -> Any:
    """A watch of rank 0 without an engine."""
    watch: Any = StepWatch.__new__(StepWatch)
    watch.name, watch.rank, watch._last_line = "align", 0, 0.0
    for name, value in values.items():
        setattr(watch, name, value)
    return watch


def test_a_line_has_step_and_figures_as_the_views_of_a_terminal_read_them(lines: list[str]) -> None:
    rows = [{"step": step, "loss": 1.5, "seconds": 2.0, "samples_per_s": 5.0} for step in range(3)]
    watch = watch_of()
    watch.report(rows, 5, ends=False)
    assert lines == ["align: step 3/5, loss 1.5000, 5.0 samples/s, 0 % waiting for data, 4 s left"]
    assert TRAINING_STEP.match(lines[0])
    watch.report(rows, 5, ends=False)
    assert len(lines) == 1, "one line in five seconds"
    watch.report(rows, 5, ends=True)
    assert lines[1].endswith(", 0 s left"), "the end has a line, also an early one"
    watch_of(rank=1).report(rows, 5, ends=True)
    assert len(lines) == 2


def test_the_first_sample_is_shown_once_with_its_trained_text(lines: list[str]) -> None:
    layout = tiny.layout()
    talks = [tiny.question("which colour is it?", "red"), *(tiny.question("why? " * 60, f"so {number}") for number in range(30))]
    sample = build_sample("s1", talks, ["view"], tiny.TOKENIZER, layout)
    model = SimpleNamespace(tokenizer=tiny.TOKENIZER, layout=layout)
    watch = watch_of(engine=SimpleNamespace(module=model))
    data = StepData([], 0, example=sample)
    watch.show_first(3, data)
    assert not lines, "a run that continues does not show it again"
    watch.show_first(0, data)
    shown = lines[0].split("\n")
    assert len(shown) == train_watch.SAMPLE_LINES
    assert re.search(r"\[red.*\]", lines[0])
    assert all(len(line) <= train_watch.SAMPLE_WIDTH for line in shown)
    assert "sample s1" in shown[1]
    assert re.search(r"text .*why\?.* \.\.\. .*\[so 0", lines[0]), "a long line is cut in its middle: its end is trained"
    assert shown[-1].strip().startswith("... ")


def test_rows_of_the_fill_are_no_samples() -> None:
    watch = watch_of(counter=SimpleNamespace(count=lambda batches, samples: samples))
    assert watch.facts([], np.array([[0, 1], [3, 0], [-1, -1]])) == 2
