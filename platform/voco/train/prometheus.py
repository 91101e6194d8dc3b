"""The series of a training run, set by rank 0 after each step (names and meanings: `voco.run.prometheus`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from voco.run.prometheus import StageMetrics
from voco.train.step_metrics import RECENT

# series: column of metrics.parquet. A column that is null, or that a run lacks, leaves its series as it is.
COLUMNS = {
    "voco_train_loss": "loss",
    "voco_train_grad_norm": "grad_norm",
    "voco_train_samples_per_s": "samples_per_s",
    "voco_train_tokens_per_s": "tokens_per_s",
    "voco_train_mfu": "mfu",
    "voco_train_memory_bytes": "memory_bytes",
    "voco_train_token_norm": "voco_norm",
    "voco_train_val_loss": "val_loss",
    "voco_train_val_score": "val_score",
    "voco_train_attempt": "attempt",
}


def export_step(stage: StageMetrics, rows: Sequence[dict[str, Any]], total: int) -> None:
    """Export the last of `rows`, the steps so far as metrics.parquet has them, of `total` steps."""
    row, recent = rows[-1], rows[-RECENT:]
    seconds = sum(item["seconds"] for item in recent)
    done = row["step"] + 1
    stage.set("voco_train_step", done)
    stage.set("voco_train_steps_total", total)
    stage.set("voco_train_last_step_time", time.time())
    stage.set("voco_train_seconds_left", seconds / len(recent) * (total - done))
    stage.set("voco_train_wait_share", sum(item.get("wait") or 0.0 for item in recent) / seconds)
    for name, column in COLUMNS.items():
        stage.set(name, row.get(column))
