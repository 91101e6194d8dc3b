"""What each Ray Train worker does: load, resume, step, report, save. The same code on a laptop's CPU and on GPUs."""

from __future__ import annotations

import os
import time
from typing import Any

import ray.train
import torch

from voco.job.config import ImageSft, Training, VideoSft
from voco.model import weights
from voco.model.voco_llama import Distillation, VocoLlama
from voco.precompute.feature_store import FeatureStore
from voco.precompute.frame_store import FrameStore
from voco.run import claim, wandb_tracking
from voco.run.wandb_tracking import TrackedRun
from voco.sequence.sequence import Layout
from voco.store.samples import SampleTables
from voco.train import checkpoints
from voco.train.batches import ImageBatches
from voco.train.sampler import Rows, epoch_order
from voco.train.step import NonFinite, NothingLearned, StepResult, learning_rate, train_step
from voco.train.video_batches import VideoBatches
from voco.train.zero import deepspeed_config

MOST_WITHOUT = 20  # steps without a supervised token, at the start of a run, before it is ended
SECONDS_BETWEEN_LINES = 5.0
BLOCKS = {"align": Training, "image_sft": ImageSft, "video_sft": VideoSft}
# What each kind trains. A video model's caches come from its frozen compressor, and nothing of it passes the projector.
TRAINED = {
    "align": ("projector.",),
    "image_sft": ("projector.", "q_former.", "language_model."),
    "video_sft": ("language_model.",),
}


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Entry of a worker. `config` is what `launch.fit` made: job block, URIs, layout, run id.

    Returns {"stopped": bool, "steps": int, "cut": text tokens left out by this rank}, or {"failed": why} for what no new
    start of the workers would mend.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    # its shared-memory all-reduce is compiled at first use, for half a minute, and a kill meanwhile leaves a lock behind
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    block: Training = BLOCKS[config["kind"]].model_validate(config["block"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(config["seed"])
    layout = Layout(**config["layout"])
    model = weights.load_checkpoint(config["model"], layout, torch.float32, block.attention, new_q_former=config["seed"])
    model.tower = None  # its features, or the frames' caches, are there already
    newline = ("image_newline",) if model.layout.method == "none" and config["kind"] != "video_sft" else ()
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(TRAINED[config["kind"]] + newline))
    if block.checkpoint_activations:
        model.language_model.train()  # transformers recomputes in training mode only; there is no dropout to switch on
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=trained, config=deepspeed_config(block, world))
    uris, shares = [item["uri"] for item in config["samples"]], [item["weight"] for item in config["samples"]]
    tables = SampleTables(uris, shares, block.share_vision)
    data: ImageBatches | VideoBatches
    if isinstance(block, VideoSft):
        data = VideoBatches(tables, FrameStore(config["frame_cache"]), model, block)
    else:
        reads = Layout(**config["teacher"]["layout"]) if config["teacher"] is not None else None
        data = ImageBatches(tables, FeatureStore(config["features"]), model, block, reads)
        if isinstance(block, ImageSft) and block.distill is not None:
            model.distillation = Distillation(block.distill.weight, block.distill.temperature, _teacher(config, block, engine))
    with wandb_tracking.start_tracking(config["tracked"] if rank == 0 else None) as record:
        loop = TrainLoop(config, block, engine, model, data, record, rank, world)
        try:
            loop.resume()
            stopped = loop.run()
        except (NonFinite, NothingLearned, checkpoints.WorkerCountChanged) as error:
            record.finish(1)
            return {"failed": str(error)}
        if not stopped:
            checkpoints.export_weights(config, model, block.zero_stage, loop.metrics, rank)
        record.finish(130 if stopped else 0)
    return {"stopped": stopped, "steps": loop.step}


def _teacher(config: dict[str, Any], block: Training, engine: Any) -> VocoLlama | None:
    """The frozen teacher, whole on every rank and in the number type of training; None: the trained network itself."""
    if not config["teacher"]["uri"]:
        return None
    dtype = torch.bfloat16 if block.precision == "bf16" else torch.float32
    teacher = weights.load_checkpoint(config["teacher"]["uri"], Layout(**config["teacher"]["layout"]), dtype, block.attention)
    teacher.tower = None
    return teacher.requires_grad_(False).to(engine.device)


class TrainLoop:
    """The state of one run on one rank: how many steps are done, and what they measured."""

    def __init__(
        self,
        config: dict[str, Any],
        block: Training,
        engine: Any,
        model: VocoLlama,
        data: ImageBatches | VideoBatches,
        record: TrackedRun,
        rank: int,
        world: int,
    ) -> None:
        self.config, self.block, self.engine, self.model = config, block, engine, model
        self.data, self.record, self.rank, self.world = data, record, rank, world
        self.mix = data.samples.tables.mix
        self.steps_per_epoch = self.mix.steps(block.global_batch)
        self.total = block.epochs * self.steps_per_epoch
        self.step = 0
        self.metrics: list[dict[str, Any]] = []

    def run(self) -> bool:
        """Train to the end. Returns True when the run was asked to stop, after a checkpoint."""
        last_line = 0.0
        while self.step < self.total:
            epoch, at = divmod(self.step, self.steps_per_epoch)
            order = epoch_order(self.mix, self.config["seed"], epoch, self.block.global_batch)
            for index in range(at, self.steps_per_epoch):
                result = self._one(epoch, order.of_rank(index, self.rank, self.world))
                if time.monotonic() - last_line > SECONDS_BETWEEN_LINES or self.step == self.total:
                    last_line = time.monotonic()
                    self._say(result)
                if self.step in (MOST_WITHOUT, self.total) and not any(row["tokens"] for row in self.metrics):
                    raise NothingLearned(
                        f"{self.step} steps and no token to learn from: answers are cut (max_tokens {self.block.max_tokens} "
                        "leaves no room behind the views), or turns end with a question, as evaluation rows do"
                    )
                if result.stop:
                    self.save()
                    return True
                if self.step % self.block.save_every == 0 or self.step == self.total:
                    self.save()
        return False

    def _one(self, epoch: int, mine: Rows) -> StepResult:
        started = time.monotonic()
        block = self.block
        rate = learning_rate(self.step, self.total, block.learning_rate, block.warmup_share, block.final_lr_share)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        before = self.data.samples.cut
        micro = self.data.passes(mine, len(mine) // block.micro_batch)
        asked = self.rank == 0 and self.config["run"] is not None and claim.stop_requested(self.config["run"])
        result = train_step(self.engine, micro, self.step, asked, self.data.samples.cut - before)
        self.metrics.append(
            {
                "step": self.step,
                "epoch": epoch,
                "loss": result.loss,
                "kl": result.kl,
                "tokens": result.tokens,
                "cut": result.cut,
                "sample_ids_sha256": result.sample_ids_sha256,
                "lr": rate,
                "grad_norm": result.grad_norm,
                "seconds": time.monotonic() - started,
            }
        )
        self.step += 1
        self.record.log_steps(self.metrics[-1:])
        return result

    def _say(self, result: StepResult) -> None:
        if self.rank:
            return
        recent = [row["seconds"] for row in self.metrics[-20:]]
        each = sum(recent) / len(recent)
        print(
            f"{self.config['name']}: step {self.step}/{self.total}, loss {result.loss:.4f}, "
            f"{self.block.global_batch / each:.0f} samples/s, {each * (self.total - self.step):.0f} s left",
            flush=True,
        )

    def save(self) -> None:
        """A checkpoint, and what W&B has recorded up to it."""
        checkpoints.save_training_state(self.engine, self.metrics, self.step, self.rank, self.world)
        self.record.flush()

    def resume(self) -> None:
        """Continue after the last checkpoint, if there is one. Raises OtherWorkers when it is of another number of them."""
        found = checkpoints.load_training_state(self.engine, self.world)
        if found is None:
            return
        self.step, self.metrics = found
        self.record.log_steps(self.metrics)  # what a kill took from the record
        if self.rank == 0:
            print(f"{self.config['name']}: continues at step {self.step}/{self.total}", flush=True)
