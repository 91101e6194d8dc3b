"""The steps of a training run on one rank: resume, step, count, report, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import torch

from voco.job.config import Training
from voco.run.logs import get_logger
from voco.run.prometheus import StageMetrics
from voco.run.wandb_tracking import TrackedRun
from voco.store import storage
from voco.train import checkpoints
from voco.train.async_saver import AsyncSaver, CheckpointFailed
from voco.train.batches import ImageBatches, StepData
from voco.train.checkpoint_files import FOLDER
from voco.train.live_images import UndecodableImage
from voco.train.preemption import Notice, WorkersLeave, leaving_reason, read_notice
from voco.train.prefetch import Prefetch
from voco.train.prometheus import export_step
from voco.train.sampler import Rows, TableMix, epoch_order, micro_batches_of
from voco.train.step import DataLost, NonFinite, NothingLearned, StepResult, UnusableData, learning_rate, problem_of, train_step
from voco.train.token_draw import token_draw
from voco.train.validation import Validation, best_step, is_exhausted
from voco.train.video_batches import VideoBatches
from voco.train.watch import StepWatch

log = get_logger(__name__)

STEPS_WITHOUT_TOKENS = 20  # at the start of a run: after this many without a supervised token it ends
ON_ALL_RANKS = (NonFinite, NothingLearned, UnusableData, DataLost)  # what every rank raises in the same step


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
        validation: Validation | None = None,
    ) -> None:
        self.config, self.block, self.engine, self.data = config, block, engine, data
        self.record, self.rank, self.world, self.validation = record, rank, world, validation
        self.watch = StepWatch(config, block, engine, rank, world)
        self.stage = StageMetrics(config["name"], config["run_id"], config["kind"])
        tables = data.samples.tables
        self.mix = TableMix(tables.sizes, tables.owners, tuple(item["weight"] for item in config["samples"]))
        self.steps_per_epoch = self.mix.steps(block.global_batch)
        self.total = block.epochs * self.steps_per_epoch
        self.draw = token_draw(config, self.total)
        self.step = self.saved_step = 0
        self.metrics: list[dict[str, Any]] = []
        folder = storage.join(config["output"], FOLDER)
        self.saver = AsyncSaver(folder, engine.optimizer, engine.device, config["name"])
        self.keep: set[int] = set()  # steps whose checkpoints stay besides the newest: the best validation's
        self.exhausted = False  # `stop_after` validations without a better one

    def run(self) -> bool:
        """Train to the end. Returns True when the run was asked to stop, after saving a checkpoint."""
        try:
            return self._run()
        except ON_ALL_RANKS:  # in the same step, so that a checkpoint in work can still be completed
            self.saver.finish()
            raise

    def _run(self) -> bool:
        with Prefetch(self._steps(self.step)) as steps:
            while not self.ends:
                result = self._step(steps)
                self.watch.report(self.metrics, self.total, self.ends)
                self._check_supervised()
                if result.stop == Notice.LEAVE and not self.ends:
                    self._leave()
                self.saver.poll()
                if result.stop == Notice.STOP:
                    self.save("the run was asked to stop", wait=True)
                    return True
                if self.step % self.block.save_every == 0 or self.ends or self.step in self.keep:
                    self.save()
        self._end_saving()
        return False

    def _end_saving(self) -> None:
        """The last checkpoint is there only for a kill from now on: if it cannot be written, the weights may be nevertheless."""
        try:
            self.save(wait=True)
        except CheckpointFailed as error:
            log.error("%s: %s; the weights are written next", self.config["name"], error)
        self.saver.close()

    def _leave(self) -> NoReturn:
        """Save and end this group of workers; Ray Train starts another, elsewhere or of another size. Raises WorkersLeave."""
        started = time.monotonic()
        try:
            self.save(leaving_reason(), wait=True)
        except CheckpointFailed as error:  # the group ends nevertheless, and continues with the checkpoint before
            log.error("%s: %s", self.config["name"], error)
            raise WorkersLeave(leaving_reason()) from error
        if self.rank == 0:
            saved = f"step {self.step} is saved after {time.monotonic() - started:.1f} s"
            log.warning("%s: %s; %s, and the workers start again", self.config["name"], leaving_reason(), saved)
        raise WorkersLeave(leaving_reason())

    def _steps(self, first: int) -> Iterator[StepData]:
        """The data of this rank's steps from `first` on. Runs on the thread that prefetches."""
        if self.engine.device.type == "cuda":
            torch.cuda.set_device(self.engine.device)  # each thread has a current device, at first GPU 0
        for step in range(first, self.total):
            epoch, index = divmod(step, self.steps_per_epoch)
            if step == first or index == 0:
                order = epoch_order(self.mix, self.config["seed"], epoch, self.block.global_batch)
            yield self._step_data(order.rank_rows(index, self.rank, self.world), step)

    def _step_data(self, rows: Rows, step: int) -> StepData:
        sizes = None if self.draw is None else self.draw(rows, step)
        if self.block.micro_tokens is not None:
            data = self.data.token_batches(rows, self.block.micro_tokens, sizes)
        else:
            data = self.data.micro_batches(rows, micro_batches_of(self.block, self.world), sizes)
        data = replace(data, facts=self.watch.facts(data.batches, rows))
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
        self.watch.show_first(self.step, data)
        stop = Notice.NONE if self.rank else read_notice(self.config["run"])
        memory, norm = self.watch.memory_bytes(), self.watch.voco_norm(self.step)
        result = train_step(self.engine, data, block.global_batch, self.step, stop, waited, problem, memory, norm)
        seconds = time.monotonic() - started
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
                "seconds": seconds,
                "wait": result.wait,
                "time": time.time(),
                **self.watch.columns(result, seconds),
            }
        )
        self.step += 1
        self.watch.warn(self.metrics, result, data)
        self._validate()
        self.record.log_steps(self.metrics[-1:])
        if self.rank == 0:
            export_step(self.stage, self.metrics, self.total)
        return result

    def _take(self, steps: Prefetch[StepData]) -> tuple[StepData, float, UnusableData | DataLost | None]:
        """This step's data, the seconds that it was waited for, and what is wrong with the data."""
        try:
            return *steps.take(), None
        except Exception as error:  # the other ranks must hear of it, or they wait for this one; `backward` raises it
            if not isinstance(error, UndecodableImage):
                log.error("%s: step %d: its data cannot be read", self.config["name"], self.step, exc_info=error)
            return StepData([], 0), 0.0, problem_of(error)

    @property
    def ends(self) -> bool:
        """Whether no step is left: all are done, or validations ended the training early."""
        return self.step == self.total or self.exhausted

    def _validate(self) -> None:
        """A validation, where one is due after this step, into the step's row."""
        if self.validation is None or (self.step % self.validation.settings.every and self.step < self.total):
            return
        started = time.monotonic()
        result = self.validation.run(self.engine)
        self.metrics[-1] |= {"val_loss": result.loss, "val_score": result.score}
        if result.loss is None and result.score is None:
            raise NothingLearned("inputs.val: its first rows have no token to predict and no reference to mark an answer by")
        self._look_at_validations()
        if self.rank == 0:
            score = "" if result.score is None else f", score {result.score:.1%} of {result.answers} answers"
            loss = "" if result.loss is None else f", loss {result.loss:.4f}"
            text = f"{loss}{score}, best at step {best_step(self.metrics, self.validation.settings)}"
            log.info("%s: validation at step %d%s, %.1f s", self.config["name"], self.step, text, time.monotonic() - started)
            if self.exhausted and self.step < self.total:
                count = self.validation.settings.stop_after
                log.info("%s: ends at step %d: %d validations without a better one", self.config["name"], self.step, count)

    def _look_at_validations(self) -> None:
        """Keep the checkpoint of the best one, and end after `stop_after` without a better one."""
        if self.validation is not None:
            best = best_step(self.metrics, self.validation.settings)
            self.keep = set() if best is None else {best}
            self.exhausted = is_exhausted(self.metrics, self.validation.settings)

    def load_exported(self) -> int:
        """Give the engine the weights that the job exports: the last, or those of the best validation. Returns their step."""
        settings = None if self.validation is None else self.validation.settings
        best = best_step(self.metrics, settings) if settings is not None and settings.exports_best else None
        if best is None or best == self.step:
            return self.step
        if checkpoints.load_training_state(self.engine, self.config["output"], best) is None:
            log.warning("%s: the checkpoint of step %d is missing; the last step is exported", self.config["name"], best)
            return self.step
        if self.rank == 0:
            log.info("%s: exports step %d, the best validation", self.config["name"], best)
        return best

    def save(self, reason: str = "", wait: bool = False) -> None:
        """Begin a checkpoint of the steps so far, and flush what W&B has recorded up to it. Every rank calls it in the same step.

        With `wait` it returns when the checkpoint is complete in storage, and raises CheckpointFailed if it cannot be written.
        """
        if self.step > self.saved_step:
            if reason and self.rank == 0:
                log.info("%s: saves step %d: %s", self.config["name"], self.step, reason)
            self.saver.save(self.step, self.metrics, self.keep)
            self.saved_step = self.step
        self.record.flush()
        if wait and (failure := self.saver.finish()):
            self.saved_step = 0
            raise CheckpointFailed(f"step {self.step} could not be saved: {failure}")

    def resume(self) -> None:
        """Continue after the newest complete checkpoint, if there is one, of any number of workers."""
        state = checkpoints.load_training_state(self.engine, self.config["output"])
        if state is None:
            return
        self.step, self.metrics = state
        self.saved_step = self.saver.last_step = self.step
        self.watch.continues(self.metrics)
        self._look_at_validations()
        self.record.log_steps(self.metrics)  # steps that a kill kept out of the record
        if self.rank == 0:
            log.info("%s: continues at step %d/%d", self.config["name"], self.step, self.total)
