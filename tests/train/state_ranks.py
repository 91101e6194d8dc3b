"""Run by test_state_shards.py once per rank: `TrainLoop` on gloo without Ray, in several cases one after the other.

Arguments: a folder (samples/, features/, initial/) and cases as JSON: name, stage, precision, steps (where this run ends),
`compression` where samples differ in it, and `changes` of the training block. A case that has a checkpoint continues it. Rank 0
writes `<folder>/<name>/run-<world>.json` and all weights, those that the run began with (`first`) and ended with (`last`).
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from ranks import gloo_group
from safetensors.torch import save_file

from voco.job.config import ImageSft
from voco.model import weights
from voco.model.compiled_layers import compile_layers
from voco.precompute.feature_store import FeatureStore
from voco.run import wandb_tracking
from voco.sequence.sequence import Layout
from voco.store.samples import SampleTables
from voco.train import loop as train_loop
from voco.train.async_saver import CheckpointFailed
from voco.train.batches import ImageBatches, StepData, Tokens
from voco.train.loop import TrainLoop
from voco.train.sampler import Rows, live_groups
from voco.train.step import DataLost, UnusableData
from voco.train.zero import deepspeed_config, gather_parameter

FROZEN = "language_model.model.layers.0."


def block_of(case: dict[str, Any]) -> ImageSft:
    values = {
        "epochs": 3, "global_batch": 12, "micro_batch": 2, "learning_rate": 3e-3, "weight_decay": 0.01, "max_tokens": 512,
        "precision": case.get("precision", "fp32"), "zero_stage": case["stage"], "save_every": 100,
    }  # fmt: skip
    return ImageSft.model_validate(values | case.get("changes", {}))


def open_loop(folder: str, case: dict[str, Any]) -> tuple[TrainLoop, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    block = block_of(case)
    layout = Layout(**weights.read_config(f"{folder}/initial")["layout"])
    if "compression" in case:
        layout = layout.model_copy(update={"tokens": max(case["compression"]["tokens"])})
    model = weights.load_checkpoint(f"{folder}/initial", layout, torch.float32)
    model.tower = None
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(FROZEN))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if block.compile:
        compile_layers(model.language_model.model)
    config = deepspeed_config(block, world, case.get("gpu", False), model.language_model.config.hidden_size)
    config["zero_optimization"] |= case.get("zero", {})
    config |= {"data_types": case["data_types"]} if "data_types" in case else {}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    tables = SampleTables([f"{folder}/samples"], block.share_vision)
    data = ImageBatches(
        tables, FeatureStore(f"{folder}/features"), model, block, live_groups=live_groups(block.global_batch, world)
    )
    settings = {
        "name": case["name"], "kind": "image_sft", "run_id": "run", "run": None, "seed": 0, "samples": [{"weight": 1.0}],
        "output": case.get("output") or f"{folder}/{case['name']}", "block": block.model_dump(), "resources": {},
        "compression": case.get("compression"),
    }  # fmt: skip
    with wandb_tracking.start_tracking(None) as record:
        return TrainLoop(settings, block, engine, data, record, rank, world), model


def run(folder: str, case: dict[str, Any]) -> None:
    loop, model = open_loop(folder, case)
    rank, world = dist.get_rank(), dist.get_world_size()
    loop.resume()
    first, loop.total = loop.step, min(loop.total, case["steps"])
    full = {"first": full_weights(model, case["stage"])}
    if rank and case.get("fault"):
        interrupt_data(loop, case["fault"])
    if case.get("outage"):
        wait_for_outage(Path(case["outage"]))
    if rank and case.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["file_limit"],) * 2)
    failed = ""
    try:
        loop.run()
        loop.saver.finish()
    except (CheckpointFailed, UnusableData, DataLost) as error:
        failed = f"{type(error).__name__}: {error}"
    full["last"] = full_weights(model, case["stage"])
    if rank == 0:
        target = Path(folder) / case["name"]
        target.mkdir(exist_ok=True)
        facts = {"first": first, "metrics": loop.metrics, "blocked_s": loop.saver.blocked_s, "failed": failed}
        (target / f"run-{world}.json").write_text(json.dumps(facts))
        for name, tensors in full.items():
            save_file(tensors, target / f"{name}-{world}.safetensors")
    dist.barrier()


def interrupt_data(loop: TrainLoop, fault: str) -> None:
    """The third step's data of this rank raises an error on the thread that prepares it."""
    batches, calls = loop.data.micro_batches, itertools.count()

    def micro_batches(rows: Rows, count: int, sizes: Tokens) -> StepData:
        if next(calls) == 2:
            raise {"KeyError": KeyError, "ConnectionError": ConnectionError, "FileNotFoundError": FileNotFoundError}[fault](
                "part"
            )
        return batches(rows, count, sizes)

    loop.data.micro_batches = micro_batches  # type: ignore[method-assign]


def wait_for_outage(flag: Path) -> None:
    """The test stops the storage when it sees the file, and then removes it."""
    if dist.get_rank() == 0:
        flag.touch()
        while flag.exists():
            time.sleep(0.05)
    dist.barrier()


def full_weights(model: Any, stage: int) -> dict[str, torch.Tensor]:
    """What the forward pass uses, every weight complete."""
    full = {}
    for name, weight in model.named_parameters():
        with gather_parameter(weight, stage if hasattr(weight, "ds_id") else 1):
            full[name] = weight.detach().float().clone().contiguous()
    return full


def main(folder: str, cases: list[dict[str, Any]]) -> None:
    train_loop.STEPS_WITHOUT_TOKENS = 10_000
    for case in cases:
        run(folder, case)


if __name__ == "__main__":
    with gloo_group():
        main(sys.argv[1], json.loads(sys.argv[2]))
