"""The lines that a run prints about its steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from voco.train import loop as train_loop
from voco.train.loop import TrainLoop


def test_steps_of_a_checkpoint_without_waits_count_as_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics of an earlier version have no column `wait`; a row of it may be null."""
    lines: list[str] = []
    monkeypatch.setattr(train_loop, "log", SimpleNamespace(info=lambda text, *values: lines.append(text % values)))
    loop: Any = TrainLoop.__new__(TrainLoop)
    loop.rank, loop.step, loop.total = 0, 3, 5
    loop.config, loop.block = {"name": "align"}, SimpleNamespace(global_batch=10)
    loop.metrics = [{"seconds": 2.0}, {"seconds": 2.0, "wait": None}, {"seconds": 1.0, "wait": 0.5}]
    loop._log(SimpleNamespace(loss=1.5))
    assert lines == ["align: step 3/5, loss 1.5000, 6 samples/s, 10 % waiting for data, 3 s left"]
