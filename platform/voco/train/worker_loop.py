"""What each Ray Train worker does: load, resume, step, report, save. The same code on a laptop's CPU and on GPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import ray.train
import torch

from voco.job.config import ImageSft, Training, VideoSft
from voco.job.spec import STAGES
from voco.model import weights
from voco.model.voco_llama import Distillation, VocoLlama
from voco.precompute.feature_store import FeatureStore
from voco.precompute.frame_store import FrameStore
from voco.run import claim, wandb_tracking
from voco.run.logs import get_logger
from voco.run.wandb_tracking import TrackedRun
from voco.sequence.sequence import Layout
from voco.store.row_group_cache import LIMIT_BYTES
from voco.store.samples import SampleTables
from voco.train import checkpoints
from voco.train.batches import ImageBatches, StepData
from voco.train.live_images import LiveImages, UndecodableImage
from voco.train.prefetch import Prefetch
from voco.train.sampler import Rows, TableMix, epoch_order, live_groups
from voco.train.step import NonFinite, NothingLearned, StepResult, UnusableData, learning_rate, train_step
from voco.train.video_batches import VideoBatches
from voco.train.zero import deepspeed_config

log = get_logger(__name__)

STEPS_WITHOUT_TOKENS = 20  # at the start of a run: after this many without a supervised token it ends
SECONDS_BETWEEN_LINES = 5.0
FEATURE_BYTES = 8 << 30  # of all workers together: features that are kept for further conversations about the same images


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Entry of a worker. `config` comes from `launch.fit`: job block, URIs, layout, run id.

    Returns {"stopped": bool, "steps": int}, or {"failed": message} for an error that a restart of the workers would not cure.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    # compiling its shared-memory all-reduce takes half a minute at first use, and a kill meanwhile leaves a lock
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    block: Training = STAGES[config["kind"]].block.model_validate(config["block"])  # type: ignore[assignment]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(config["seed"])
    model = load_model(config, block)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=trained, config=deepspeed_config(block, world))
    data = open_data(config, block, model, engine, world)
    with wandb_tracking.start_tracking(config["tracked"] if rank == 0 else None) as record:
        loop = TrainLoop(config, block, engine, data, record, rank, world)
        try:
            loop.resume()
            stopped = loop.run()
        except (NonFinite, NothingLearned, UnusableData, checkpoints.WorkerCountChanged) as error:
            record.finish(1)
            return {"failed": str(error)}
        if not stopped:
            checkpoints.export_weights(config, model, block.zero_stage, loop.metrics, rank)
        record.finish(130 if stopped else 0)
    return {"stopped": stopped, "steps": loop.step}


def load_model(config: dict[str, Any], block: Training) -> VocoLlama:
    """The model to start from, with gradients for the weights that this kind of job trains, and without its tower, which is
    detached from it where images are not read as features.
    """
    layout = Layout(**config["layout"])
    model = weights.load_checkpoint(config["model"], layout, torch.float32, block.attention, method_seed=config["seed"])
    if is_live(config):
        model.detach_tower()
    model.tower = None  # DeepSpeed takes all that is left, and features or frames' caches are precomputed
    prefixes = tuple(f"{layout.method}." if prefix == "method." else prefix for prefix in STAGES[config["kind"]].trains)
    if "projector." in prefixes and layout.rule.uncompressed:
        prefixes += ("image_newline",)  # LLaVA-1.6's, which only an uncompressed image has
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(prefixes))
    if block.checkpoint_activations:
        model.language_model.train()  # transformers recomputes in training mode only; there is no dropout to switch on
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def is_live(config: dict[str, Any]) -> bool:
    """Whether the frozen tower runs in each step: the job reads neither features nor frame caches."""
    return not config["features"] and not config["frame_cache"]


def live_images(config: dict[str, Any], block: Training, model: VocoLlama, device: torch.device) -> LiveImages:
    """Pixels for the model's detached tower, which is moved to its device: in bf16 on a GPU that trains so, else in fp32."""
    assert model.detached_tower is not None
    tower = model.detached_tower.tower
    in_bf16 = device.type == "cuda" and block.precision == "bf16"
    tower.to(device, torch.bfloat16 if in_bf16 else torch.float32)
    return LiveImages(lambda image: tower.tiles(image)[0], config["threads"])


def open_data(config: dict[str, Any], block: Training, model: VocoLlama, engine: Any, world: int) -> ImageBatches | VideoBatches:
    """The job's samples as batches of one of `world` workers; with distillation the model also gets its teacher."""
    tables = SampleTables([item["uri"] for item in config["samples"]], block.share_vision)
    groups = live_groups(block.global_batch, world)
    if isinstance(block, VideoSft):
        return VideoBatches(tables, FrameStore(config["frame_cache"]), model, block, groups)
    teacher = Layout(**config["teacher"]["layout"]) if config["teacher"] is not None else None
    features: FeatureStore | LiveImages
    if is_live(config):
        features = live_images(config, block, model, engine.device)
    else:
        limit = LIMIT_BYTES if block.share_vision else max(LIMIT_BYTES, FEATURE_BYTES // world)
        features = FeatureStore(config["features"], limit)
    data = ImageBatches(tables, features, model, block, teacher, groups)
    if isinstance(block, ImageSft) and block.distill is not None:
        distill = block.distill
        model.distillation = Distillation(distill.weight, distill.temperature, _load_teacher(config, block, engine))
    return data


def _load_teacher(config: dict[str, Any], block: Training, engine: Any) -> VocoLlama | None:
    """The frozen teacher, unsharded on every rank and in training's number type; None: the trained network itself."""
    if not config["teacher"]["uri"]:
        return None
    dtype = torch.bfloat16 if block.precision == "bf16" else torch.float32
    teacher = weights.load_checkpoint(config["teacher"]["uri"], Layout(**config["teacher"]["layout"]), dtype, block.attention)
    teacher.tower = None
    return teacher.requires_grad_(False).to(engine.device)


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
