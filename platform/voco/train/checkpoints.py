"""The checkpoints that a run resumes from (DeepSpeed's shards and the progress), and the complete weights at its end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
import torch.distributed as dist

from voco.model import weights
from voco.model.voco_llama import VocoLlama
from voco.store import parquet, schemas, storage
from voco.train.zero import gather_parameter

TAG = "state"  # DeepSpeed's name of the checkpoint inside its directory


class WorkerCountChanged(Exception):
    """The checkpoint has the shards of another number of workers."""


def save_training_state(engine: Any, metrics: list[dict[str, Any]], step: int, rank: int, world: int) -> None:
    """A checkpoint of every rank's shards, with the next step and the metrics so far."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=TAG)
        if rank == 0:
            storage.write_json(str(Path(folder) / "progress.json"), {"step": step, "workers": world})
            _write_metrics(str(Path(folder) / schemas.METRICS_FILE), metrics)
        dist.barrier()
        ray.train.report(
            {"step": step, "loss": metrics[-1]["loss"]},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{step:08d}",
        )


def load_training_state(engine: Any, world: int) -> tuple[int, list[dict[str, Any]]] | None:
    """Load the last checkpoint into the engine: the next step and the metrics so far; None when there is none.

    Raises WorkerCountChanged when it is of another number of workers.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        progress = storage.read_json(str(Path(folder) / "progress.json"))
        if progress["workers"] != world:
            raise WorkerCountChanged(
                f"its checkpoint holds the shards of {progress['workers']} workers, the job now has {world}; "
                f"set resources.workers back to {progress['workers']}"
            )
        path, _ = engine.load_checkpoint(folder, tag=TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint of step {progress['step']}")
        return int(progress["step"]), parquet.read_table(str(Path(folder) / schemas.METRICS_FILE)).to_pylist()


def export_weights(config: dict[str, Any], model: VocoLlama, zero_stage: int, metrics: list[dict[str, Any]], rank: int) -> None:
    """Complete weights to `<output>/model` and the metrics beside them. Rank 0 writes; every rank gathers what was trained.

    Frozen weights are taken from the starting model: training may have rounded them to another number type.
    """
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    trained: dict[str, Any] = {}
    for name in (name for name in weights.own_state(model) if name in named):
        with gather_parameter(named[name], zero_stage):
            if rank == 0:
                trained[name] = named[name].detach().cpu().clone()
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            start = weights.load_checkpoint(config["model"], model.layout, method_seed=config["seed"])
            state = {**weights.own_state(start), **trained}
            weights.save_checkpoint(start, state, Path(folder) / "model", keep_compressor=config["kind"] == "video_sft")
            storage.put_directory(Path(folder) / "model", storage.join(config["output"], "model"))
        _write_metrics(storage.join(config["output"], schemas.METRICS_FILE), metrics)
    dist.barrier()


def _write_metrics(uri: str, metrics: list[dict[str, Any]]) -> None:
    parquet.write_table(uri, [pa.Table.from_pylist(metrics, schema=schemas.METRICS)], schemas.METRICS)
