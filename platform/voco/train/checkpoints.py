"""The checkpoints that a run continues from, and the complete weights at its end. `async_saver.py` writes the former."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from voco.model import adapter, weights
from voco.model.voco_llama import VocoLlama
from voco.model.weight_writer import file_order
from voco.store import schemas, storage
from voco.train import checkpoint_files
from voco.train.checkpoint_files import FOLDER, UnreadableCheckpoint, write_metrics
from voco.train.state_shards import load_state
from voco.train.zero import gather_parameter


def load_training_state(engine: Any, output: str, step: int | None = None) -> tuple[int, list[dict[str, Any]]] | None:
    """Load a checkpoint of an output into the engine: the newest complete one, or that of a step.

    Returns the steps that are done and their metrics, or None without such a checkpoint. It may be of any number of workers and
    any ZeRO stage. Rank 0 looks for it, and without `step` removes what killed workers left; every rank reads what it owns.
    """
    folder = storage.join(output, FOLDER)
    shared: list[Any] = [None, None, None]
    if dist.get_rank() == 0:
        try:
            if step is None:
                checkpoint = checkpoint_files.newest(folder)
                checkpoint_files.delete_incomplete(folder)
            else:
                checkpoint = checkpoint_files.read_checkpoint(folder, step)
            shared = [checkpoint, checkpoint and checkpoint_files.read_metrics(checkpoint), None]
        except UnreadableCheckpoint as error:
            shared[2] = error
    dist.broadcast_object_list(shared)
    checkpoint, metrics, problem = shared
    if problem is not None:
        raise problem
    if checkpoint is None:
        return None
    load_state(engine.optimizer, checkpoint.files)
    return checkpoint.step, metrics


def export_weights(config: dict[str, Any], model: VocoLlama, zero_stage: int, metrics: list[dict[str, Any]], rank: int) -> None:
    """Complete weights to `<output>/model` and the metrics beside them. Rank 0 writes; every rank gathers what was trained.

    Weights are gathered and written one by one. Frozen ones are taken from the starting model's file: training may have rounded
    them to another number type. A trained adapter is merged into them, and also written to `<output>/adapter`.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    factors: dict[str, Tensor] = {}
    for name, weight in trained.items():
        if adapter.is_adapter(name):
            with gather_parameter(weight, zero_stage):
                factors[name] = weight.detach().cpu().clone()
    full = {name: weight for name, weight in trained.items() if not adapter.is_adapter(name)}
    kinds = {name: (weight.dtype, tuple(getattr(weight, "ds_shape", weight.shape))) for name, weight in full.items()}

    def gathered(name: str) -> Tensor:
        with gather_parameter(full[name], zero_stage):
            return full[name].detach().cpu().clone()

    if rank == 0:
        start = weights.StoredWeights(config["model"], model.layout, config["seed"])

        def read(name: str) -> Tensor:
            if name in full:
                return gathered(name)
            weight = start.read(name)
            return weight if model.lora is None else adapter.merged(name, weight, factors, model.lora, model.layout.voco_id)

        state = start.state | {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in kinds.items()}
        with tempfile.TemporaryDirectory() as folder:
            if model.lora is not None:
                adapter.save_adapter(factors, model.lora, model.layout.voco_id, config["model"], Path(folder) / "adapter")
                storage.put_directory(Path(folder) / "adapter", storage.join(config["output"], "adapter"))
            keeps_compressor = config["kind"] == "video_sft"
            weights.save_checkpoint(start.model, state, Path(folder) / "model", keeps_compressor, read)
            storage.put_directory(Path(folder) / "model", storage.join(config["output"], "model"))
        write_metrics(storage.join(config["output"], schemas.METRICS_FILE), metrics)
    else:
        for name in file_order(kinds):  # as rank 0 does inside `save_checkpoint`
            gathered(name)
    dist.barrier()
