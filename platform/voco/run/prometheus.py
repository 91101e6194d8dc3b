"""What a running stage exports to Prometheus, through `ray.util.metrics` and the nodes' agents (docs/operations.md#watching).

Ray exports a series under its name with `ray_` before it. Ray 2.60 exports a gauge only where it was set since the process's last
report, every 10 s (`metrics_report_interval_ms`), and its agent drops it after two; so a thread sets all values again and
again. A series then lasts as long as its stage in a living process, however long a step or a unit takes, and a step costs only
the storing of its numbers. A counter would stay in the agent after its process, and a run that was started again would be counted
twice: therefore everything here is a gauge.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# `run` is the job's name: Prometheus has a label `job` of its scrape jobs
TAGS = ("run", "run_id", "kind")
REASON = "reason"
REPEAT_S = 2.5  # less than Ray's interval, with time to spare on a busy machine

# name: (meaning, tags besides TAGS)
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "voco_stage_running": ("1 while the stage runs", ()),
    "voco_units_done": ("units of work that are done, also those of earlier attempts", ()),
    "voco_units_total": ("units of work of the stage", ()),
    "voco_rows_read": ("rows that this driver's units have read, with those that the listing rejected", ()),
    "voco_rows_written": ("rows that this driver's units have written", ()),
    "voco_rejects": ("rows that this driver has seen rejected, by reason", (REASON,)),
    "voco_train_step": ("optimizer steps that are done", ()),
    "voco_train_steps_total": ("optimizer steps of the run", ()),
    "voco_train_loss": ("the loss of the last step", ()),
    "voco_train_grad_norm": ("norm of the last step's gradient", ()),
    "voco_train_samples_per_s": ("samples a second, of all workers", ()),
    "voco_train_tokens_per_s": ("tokens a second, of all workers", ()),
    "voco_train_mfu": ("model FLOPs over the peak of the devices, 0 to 1", ()),
    "voco_train_wait_share": ("share of the time in which the slowest worker waited for its data, 0 to 1", ()),
    "voco_train_memory_bytes": ("peak memory of a worker's device, or of its process", ()),
    "voco_train_token_norm": ("norm of the embedding of <voco>", ()),
    "voco_train_val_loss": ("the last validation's loss", ()),
    "voco_train_val_score": ("the last validation's score, 0 to 1", ()),
    "voco_train_attempt": ("starts of the worker group before this one", ()),
    "voco_train_seconds_left": ("seconds that the remaining steps take at the pace of the last ones", ()),
    "voco_train_last_step_time": ("when the last step ended, Unix seconds", ()),
}


class StageMetrics:
    """The series of one stage in this process. Without a Ray in this process nothing is exported."""

    def __init__(self, run: str, run_id: str, kind: str) -> None:
        self.run, self.run_id, self.kind = run, run_id, kind
        self._rows: Counter[str] = Counter()
        self._rejects: Counter[str] = Counter()
        self._gauges: dict[str, Any] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}  # by name and further tags
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, name: str, value: float | None, **tags: str) -> None:
        """Set a gauge of GAUGES. None, for what is not known, leaves it as it is."""
        if value is None or self._closed.is_set() or not _ray_runs():
            return
        self._values[name, tuple(tags.items())] = float(value)
        if self._thread is None:
            self._thread = threading.Thread(target=self._export, daemon=True)
            self._thread.start()

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            meaning, more = GAUGES[name]
            gauge = self._gauges[name] = Gauge(name, meaning, tag_keys=(*TAGS, *more))
            gauge.set_default_tags({"run": self.run, "run_id": self.run_id, "kind": self.kind})
        return self._gauges[name]

    def _export(self) -> None:
        ended = False
        while not ended and _ray_runs():
            ended = self._closed.wait(0 if not self._gauges else REPEAT_S)
            for (name, tags), value in list(self._values.items()):
                self._gauge(name).set(value, dict(tags))

    def close(self) -> None:
        """The stage has ended: its series end with Ray's next reports."""
        self._closed.set()

    def set_units(self, done: int, total: int) -> None:
        """How many units of work are done, of how many."""
        self.set("voco_units_done", done)
        self.set("voco_units_total", total)

    def count_rows(self, read: int, written: int, rejected: dict[str, int]) -> None:
        """Add to the rows that were read, written and, by reason, rejected."""
        self._rows.update(read=read, written=written)
        self._rejects.update(rejected)
        self.set("voco_rows_read", self._rows["read"])
        self.set("voco_rows_written", self._rows["written"])
        for reason, count in self._rejects.items():
            self.set("voco_rejects", count, reason=reason)


_running: list[StageMetrics] = []  # of this process, the innermost last: a sweep runs stages inside itself


@contextmanager
def stage_metrics(run: str, run_id: str, kind: str) -> Iterator[StageMetrics]:
    """The stage that this driver runs in the block."""
    metrics = StageMetrics(run, run_id, kind)
    metrics.set("voco_stage_running", 1)
    _running.append(metrics)
    try:
        yield metrics
    finally:
        _running.remove(metrics)
        metrics.close()


def current_stage() -> StageMetrics:
    """The innermost stage that runs in this process; outside any, one that has ended, which exports nothing."""
    if _running:
        return _running[-1]
    ended = StageMetrics("", "", "")
    ended.close()
    return ended


def _ray_runs() -> bool:
    """True in a process of a Ray cluster. Does not import Ray, which takes longer than a small job."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
