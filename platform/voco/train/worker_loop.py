"""What each Ray Train worker does: load, resume, step, report, save. The same code on a laptop's CPU and on GPUs."""

from __future__ import annotations

import os
from typing import Any

import ray.train
import torch

from voco.job.config import Training
from voco.job.spec import STAGES
from voco.model import weights
from voco.model.attention.plan import resolve_backend
from voco.model.checkpoint_layout import head_width
from voco.model.compiled_layers import compile_layers
from voco.run import wandb_tracking
from voco.run.logs import get_logger
from voco.train import checkpoints
from voco.train.async_saver import CheckpointFailed
from voco.train.checkpoint_files import UnreadableCheckpoint
from voco.train.loop import TrainLoop
from voco.train.step import NonFinite, NothingLearned, UnusableData
from voco.train.weight_placement import make_parameters, worker_device
from voco.train.worker_model import load_model, open_data, open_validation
from voco.train.zero import deepspeed_config

log = get_logger(__name__)


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Entry of a worker. `config` comes from `launch.fit`: job block, URIs, layout, run id.

    Returns {"stopped": bool, "steps": int, "exported": step, "attention": name of the backend}, or {"failed":
    message} for an error that a restart of the workers would not cure.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    # compiling its shared-memory all-reduce takes half a minute at first use, and a kill meanwhile leaves a lock
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    block: Training = STAGES[config["kind"]].block.model_validate(config["block"])  # type: ignore[assignment]
    block = block.model_copy(update={"attention": attention_here(config, block)})
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(config["seed"])
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    width = weights.read_config(config["model"])["language_model"]["hidden_size"]
    settings = deepspeed_config(block, world, torch.cuda.is_available(), width)
    device = worker_device()
    model = load_model(config, block, device, make_parameters(settings, device))
    if block.compile:
        compile_layers(model.language_model.model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
    if rank == 0:
        log.info("%s: %d workers, ZeRO-%d, attention %s", config["name"], world, block.zero_stage, block.attention)
    data = open_data(config, block, model, engine, world)
    with wandb_tracking.start_tracking(config["tracked"] if rank == 0 else None) as record:
        validation = open_validation(config, block, model, engine, rank, world)
        loop = TrainLoop(config, block, engine, data, record, rank, world, validation)
        try:
            loop.resume()
            stopped = loop.run()
            exported = loop.step if stopped else loop.load_exported()
        except (NonFinite, NothingLearned, UnusableData, CheckpointFailed, UnreadableCheckpoint) as error:
            record.finish(1)
            return {"failed": str(error)}
        if not stopped:
            checkpoints.export_weights(config, model, block.zero_stage, loop.metrics, rank)
        record.finish(130 if stopped else 0)
    return {"stopped": stopped, "steps": loop.step, "exported": exported, "attention": block.attention}


def attention_here(config: dict[str, Any], block: Training) -> str:
    """The attention backend of this worker: what `auto` stands for depends on its GPU."""
    dtype = torch.bfloat16 if block.precision == "bf16" else torch.float32
    return resolve_backend(block.attention, dtype, head_width(weights.read_config(config["model"])["language_model"]))
