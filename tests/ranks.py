"""Processes of a gloo group, started by torchrun: what a training does on several workers, without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from voco.demo.cluster import free_ports

TESTS = Path(__file__).parent


def launch_ranks(script: Path, ranks: int, *arguments: str, seconds: float = 400, **variables: str) -> str:
    """Run `script arguments` in `ranks` processes, which call `gloo_group`. Returns what all of them printed.

    When a rank fails, torchrun ends the others.
    """
    (port,) = free_ports(1)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "platform")])
    env = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    done = subprocess.run(
        [*launcher, *rendezvous, str(script), *arguments],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@contextmanager
def gloo_group() -> Iterator[tuple[int, int]]:
    """Join the group of `launch_ranks` through DeepSpeed. Yields this process's rank and the number of ranks."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as the product's workers do
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    yield dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()  # otherwise a thread of gloo may outlive the interpreter, and the process aborts
