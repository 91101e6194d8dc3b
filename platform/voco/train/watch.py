"""What one rank observes of its training steps: the columns of metrics beside the loss, warnings, and the first sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from voco.job.config import Training, VideoSft
from voco.model.batch import Batch, CachedBatch
from voco.model.show_tokens import show_trained
from voco.run.logs import get_logger
from voco.train import step_metrics
from voco.train.batches import StepData
from voco.train.sampler import Rows
from voco.train.step import StepResult, worst_samples
from voco.train.step_metrics import Row, StepFacts

log = get_logger(__name__)

SECONDS_BETWEEN_LINES = 5.0
SAMPLE_LINES, SAMPLE_WIDTH = 20, 160  # of the first sample in the log


class StepWatch:
    """Figures of the steps of one run on one rank of `world`. None of its methods but `warn` communicates."""

    def __init__(self, config: dict[str, Any], block: Training, engine: Any, rank: int, world: int) -> None:
        self.name, self.block, self.engine, self.rank, self.world = config["name"], block, engine, rank, world
        self.counter = step_metrics.StepCounter(engine.module)
        self.peak = step_metrics.peak_flops(block, engine.device, config.get("peak_tflops"))
        self.attempt = 0
        self._last_line = 0.0
        if engine.device.type == "cuda":  # loading may have taken more than any step will
            torch.cuda.reset_peak_memory_stats(engine.device)

    def continues(self, rows: Sequence[Row]) -> None:
        """The run continues after these steps: this start of the workers is one more than the last of theirs."""
        self.attempt = 1 + max((row.get("attempt") or 0 for row in rows), default=-1)

    def facts(self, batches: Sequence[Batch | CachedBatch], rows: Rows) -> StepFacts:
        """What a step takes of this rank; on the thread that prepares it."""
        return self.counter.count(batches, int((rows[:, 0] >= 0).sum()))

    def memory_bytes(self) -> int:
        return step_metrics.used_memory(self.engine.device)

    def voco_norm(self, step: int) -> Tensor | None:
        return step_metrics.voco_norm(self.engine.module, self.block.zero_stage, step, isinstance(self.block, VideoSft))

    def columns(self, result: StepResult, seconds: float) -> Row:
        """The columns of a step's row that are figures of the machine, and the norm of <voco>."""
        rates = step_metrics.rates(result.facts, seconds, self.peak, self.world)
        return {**rates, "voco_norm": result.voco_norm, "attempt": self.attempt, "val_loss": None, "val_score": None}

    def warn(self, rows: Sequence[Row], result: StepResult, data: StepData) -> None:
        """Log what is wrong with the last step, with the samples whose loss was largest. Every rank calls it."""
        if problem := step_metrics.warning_of(rows):
            sample_ids = worst_samples(result, data.batches)
            if self.rank == 0:
                samples = step_metrics.ids_text(sample_ids)
                log.warning("%s: step %d: %s; largest loss in samples %s", self.name, rows[-1]["step"], problem, samples)

    def show_first(self, step: int, data: StepData) -> None:
        """Log the first sample of a run, its trained text in brackets."""
        if self.rank == 0 and step == 0 and data.example is not None:
            model = self.engine.module
            shown = show_trained(data.example, model.tokenizer, model.layout, SAMPLE_LINES - 1, SAMPLE_WIDTH)
            log.info("%s: the first sample, [trained text] in brackets:\n%s", self.name, shown)

    def report(self, rows: Sequence[Row], total: int, ends: bool) -> None:
        """A line about the last steps, if the one before is `SECONDS_BETWEEN_LINES` old or the training ends."""
        if self.rank or not (ends or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES):
            return
        self._last_line = time.monotonic()
        done = rows[-1]["step"] + 1
        figures = step_metrics.progress_text(rows, 0 if ends else total - done)
        log.info("%s: step %d/%d, %s", self.name, done, total, figures)
