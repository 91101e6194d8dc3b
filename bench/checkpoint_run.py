"""Run by checkpoint.py under our source or an earlier one: saves and a load of one rank's training state. Prints a JSON object.

python bench/checkpoint_run.py FOLDER

Half of the weights are frozen, as under LoRA or in alignment. A save is what the source's training loop calls. The earlier build
hands its directory to `ray.train.report`, whose part is done here as Ray 2.60 does it on one machine: a copy of the files by
pyarrow to the run's folder. Its barrier and its call of the controller are left out.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(probe.getsockname()[1])

import deepspeed
import pyarrow.fs as pafs
import torch
from torch import nn

WIDTH, LAYERS = 2000, 30  # 4 M weights a layer; the odd layers are frozen
SAVES, STEPS = 4, 3  # the first save counts apart; steps at least between two saves


def build() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    for number, layer in enumerate(model):
        layer.weight.requires_grad_(number % 2 == 0)
    config = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 30,
    }  # fmt: skip
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    return engine


def step(engine: Any) -> float:
    """One optimizer step. Returns its seconds."""
    began = time.perf_counter()
    engine.backward(engine(torch.ones(4, WIDTH)).square().mean())
    engine.step()
    return time.perf_counter() - began


def own_calls(
    engine: Any, folder: str
) -> tuple[Callable[[int], None], Callable[[], None], Callable[[], str], Callable[[], None]]:
    """To begin a save of a step, to go on with it in each step, to wait for it, and to load the newest."""
    from voco.train import checkpoint_files, checkpoints
    from voco.train.async_saver import AsyncSaver

    saver = AsyncSaver(f"{folder}/{checkpoint_files.FOLDER}", engine.optimizer, engine.device, "bench")
    return (
        lambda number: saver.save(number, METRICS[:number]),
        saver.poll,
        saver.finish,
        lambda: checkpoints.load_training_state(engine, folder) and None,
    )


def earlier_calls(
    engine: Any, folder: str
) -> tuple[Callable[[int], None], Callable[[], None], Callable[[], str], Callable[[], None]]:
    """The same of the earlier build, whose save returns when all is done."""
    import ray.train

    from voco.train import checkpoints

    last: list[str] = []

    def report(values: dict[str, Any], checkpoint: Any, checkpoint_dir_name: str) -> None:
        target = f"{folder}/checkpoints/{checkpoint_dir_name}"
        os.makedirs(target)
        local = pafs.LocalFileSystem()
        pafs.copy_files(checkpoint.path, target, source_filesystem=local, destination_filesystem=local)
        last.append(target)

    ray.train.report = report
    ray.train.get_checkpoint = lambda: ray.train.Checkpoint.from_directory(last[-1])
    return (
        lambda number: checkpoints.save(engine, METRICS[:number], number, 0, 1),
        lambda: None,
        lambda: "",
        lambda: checkpoints.resume(engine, 1) and None,
    )


METRICS = [
    {
        "step": number, "epoch": 0, "loss": 1.0, "kl": None, "tokens": 10, "cut": 0, "sample_ids_sha256": "0" * 64, "lr": 1e-3,
        "grad_norm": 1.0, "seconds": 1.0, "wait": 0.0,
    }
    for number in range(10_000)
]  # fmt: skip


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(folder: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    engine = build()
    is_ours = not hasattr(__import__("voco.train.checkpoints", fromlist=["x"]), "OtherWorkers")
    save, poll, wait, load = (own_calls if is_ours else earlier_calls)(engine, folder)
    quiet = [step(engine) for _ in range(4)][1:]
    blocked, complete, busy = [], [], []
    for number in range(1, SAVES + 1):
        began = time.perf_counter()
        save(number)
        blocked.append(time.perf_counter() - began)
        for _ in range(STEPS):
            busy.append(step(engine))
            poll()
        failure = wait()
        complete.append(time.perf_counter() - began)
        if failure:
            raise SystemExit(failure)
    steps = sorted(Path(folder, "checkpoints").iterdir())
    # the state after the last save's step, against what comes back
    save(SAVES + 1)
    expected = [weight.detach().clone() for weight in engine.module.parameters()]
    wait()
    step(engine)
    began = time.perf_counter()
    load()
    load_s = time.perf_counter() - began
    is_equal = all(torch.equal(weight, kept) for weight, kept in zip(engine.module.parameters(), expected, strict=True))
    if not is_equal:
        raise SystemExit("the weights that were loaded are not those that were saved")
    trained = sum(weight.numel() for weight in engine.module.parameters() if weight.requires_grad)
    result = {
        "first_blocked_s": blocked[0],
        "blocked_s": statistics.median(blocked[1:]),
        "complete_s": statistics.median(complete[1:]),
        "step_s": statistics.median(quiet),
        "step_while_saving_s": statistics.median(busy),
        "load_s": load_s,
        "bytes": folder_bytes(steps[-1]),
        "state_bytes": 12 * trained,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
