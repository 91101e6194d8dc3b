"""What each Ray Train worker does: load, resume, step, report, save. The same code on a laptop's CPU and on GPUs."""

from __future__ import annotations

import os
from typing import Any

import ray.train
import torch

from voco.job.config import Training
from voco.job.spec import STAGES
from voco.run import wandb_tracking
from voco.train import checkpoints
from voco.train.loop import TrainLoop
from voco.train.step import NonFinite, NothingLearned, UnusableData
from voco.train.worker_model import load_model, open_data
from voco.train.zero import deepspeed_config


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
