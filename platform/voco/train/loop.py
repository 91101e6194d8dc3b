"""The steps of a training run on one rank: resume, step, count, report, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from voco.job.config import Training
from voco.run import claim
from voco.run.logs import get_logger
from voco.run.wandb_tracking import TrackedRun
from voco.train import checkpoints
from voco.train.batches import ImageBatches, StepData
from voco.train.live_images import UndecodableImage
from voco.train.prefetch import Prefetch
from voco.train.sampler import Rows, TableMix, epoch_order
from voco.train.step import NothingLearned, StepResult, learning_rate, train_step
from voco.train.video_batches import VideoBatches

log = get_logger(__name__)

STEPS_WITHOUT_TOKENS = 20  # at the start of a run: after this many without a supervised token it ends
SECONDS_BETWEEN_LINES = 5.0


class TrainLoop:
    """The state of one run on one rank: how many steps are done, and their metrics."""

    def __init__(
        self,
        config: dict[str, Any],
        block: Training,
        engine: Any,
        data: ImageBatches | VideoBatches,
        record: TrackedRun,
        rank: int,
        world: int,
    ) -> None:
        self.config, self.block, self.engine, self.data = config, block, engine, data
        self.record, self.rank, self.world = record, rank, world
        tables = data.samples.tables
        self.mix = TableMix(tables.sizes, tables.owners, tuple(item["weight"] for item in config["samples"]))
        self.steps_per_epoch = self.mix.steps(block.global_batch)
        self.total = block.epochs * self.steps_per_epoch
        self.step = 0
        self.metrics: list[dict[str, Any]] = []

    def run(self) -> bool:
        """Train to the end. Returns True when the run was asked to stop, after saving a checkpoint."""
        last_line = 0.0
        with Prefetch(self._steps(self.step)) as steps:
            while self.step < self.total:
                result = self._step(steps)
                if time.monotonic() - last_line > SECONDS_BETWEEN_LINES or self.step == self.total:
                    last_line = time.monotonic()
                    self._log(result)
                self._check_supervised()
                if result.stop or self.step % self.block.save_every == 0 or self.step == self.total:
                    self.save()
                if result.stop:
                    return True
        return False

    def _steps(self, first: int) -> Iterator[StepData]:
        """The data of this rank's steps from `first` on. Runs on the thread that prefetches."""
        if self.engine.device.type == "cuda":
            torch.cuda.set_device(self.engine.device)  # each thread has a current device, at first GPU 0
        for step in range(first, self.total):
            epoch, index = divmod(step, self.steps_per_epoch)
            if step == first or index == 0:
                order = epoch_order(self.mix, self.config["seed"], epoch, self.block.global_batch)
            yield self._step_data(order.rank_rows(index, self.rank, self.world))

    def _step_data(self, rows: Rows) -> StepData:
        data = self.data.micro_batches(rows, len(rows) // self.block.micro_batch)
        return data.pinned() if self.engine.device.type == "cuda" else data

    def _check_supervised(self) -> None:
        if self.step in (STEPS_WITHOUT_TOKENS, self.total) and not any(row["tokens"] for row in self.metrics):
            raise NothingLearned(
                f"{self.step} steps and no token to learn from: answers are cut (max_tokens {self.block.max_tokens} "
                "leaves no room after the views), or turns end with a question, as evaluation rows do"
            )

    def _step(self, steps: Prefetch[StepData]) -> StepResult:
        started = time.monotonic()
        block = self.block
        rate = learning_rate(self.step, self.total, block.learning_rate, block.warmup_share, block.final_lr_share)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        data, waited, problem = self._take(steps)
        stop = self.rank == 0 and claim.stop_requested(self.config["run"])
        result = train_step(self.engine, data.batches, self.step, stop, data.cut, waited, problem)
        self.metrics.append(
            {
                "step": self.step,
                "epoch": self.step // self.steps_per_epoch,
                "loss": result.loss,
                "kl": result.kl,
                "tokens": result.tokens,
                "cut": result.cut,
                "sample_ids_sha256": result.sample_ids_sha256,
                "lr": rate,
                "grad_norm": result.grad_norm,
                "seconds": time.monotonic() - started,
                "wait": result.wait,
            }
        )
        self.step += 1
        self.record.log_steps(self.metrics[-1:])
        return result

    def _take(self, steps: Prefetch[StepData]) -> tuple[StepData, float, str]:
        """This step's data, the seconds that it was waited for, and what is wrong with the data."""
        try:
            return *steps.take(), ""
        except UndecodableImage as error:  # the other ranks must hear of it, or they wait for this one
            return StepData([], 0), 0.0, str(error)

    def _log(self, result: StepResult) -> None:
        if self.rank:
            return
        recent = self.metrics[-20:]
        total = sum(row["seconds"] for row in recent)
        seconds, waiting = total / len(recent), sum(row.get("wait") or 0.0 for row in recent) / total
        rate, left = self.block.global_batch / seconds, seconds * (self.total - self.step)
        name, step = self.config["name"], f"step {self.step}/{self.total}"
        line = "%s: %s, loss %.4f, %.0f samples/s, %.0f %% waiting for data, %.0f s left"
        log.info(line, name, step, result.loss, rate, 100 * waiting, left)

    def save(self) -> None:
        """A checkpoint, and what W&B has recorded up to it."""
        checkpoints.save_training_state(self.engine, self.metrics, self.step, self.rank, self.world)
        self.record.flush()

    def resume(self) -> None:
        """Continue after the last checkpoint, if there is one. Raises WorkerCountChanged for another number of workers."""
        state = checkpoints.load_training_state(self.engine, self.world)
        if state is None:
            return
        self.step, self.metrics = state
        self.record.log_steps(self.metrics)  # steps that a kill kept out of the record
        if self.rank == 0:
            log.info("%s: continues at step %d/%d", self.config["name"], self.step, self.total)
