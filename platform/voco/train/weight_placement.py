"""Where a worker's weights go while they load: a shard of each under ZeRO-3, else a complete copy; each file once for a node."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from voco.model.checkpoint_layout import WEIGHTS_FILE, model_uri
from voco.model.weight_reader import WeightReader
from voco.model.weights import MakeParameter, parameter_on
from voco.store import storage

COPY_WAIT_S = 3600.0  # for another worker of the node to download a model; 100 GB at 30 MB/s


def worker_device() -> torch.device:
    """Where this worker trains, as DeepSpeed's engine chooses it."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", 0))))


def make_parameters(config: dict[str, Any], device: torch.device) -> MakeParameter:
    """How a worker makes its parameters under DeepSpeed's `config`. For ZeRO-3 the process group must exist."""
    if config["zero_optimization"]["stage"] == 3:
        return _sharded(config)
    complete = parameter_on(device)

    def make(reader: WeightReader, name: str, dtype: torch.dtype) -> nn.Parameter:
        parameter = complete(reader, name, dtype)
        # All ranks have read the same file, so rank 0 need not send it: on the CPU each rank would get a private copy of the
        # file's pages. DeepSpeed 0.19.8 leaves parameters with this mark out of its first broadcast (`_broadcast_model`) and
        # looks at it nowhere else without its own OptimizedLinear.
        parameter.ds_optim_param = True  # type: ignore[attr-defined]
        return parameter

    return make


def _sharded(config: dict[str, Any]) -> MakeParameter:
    """This rank's shard of each parameter as `deepspeed.zero.Init` makes it, from this rank's slice of the file alone.

    `Init` would take the complete parameter, on every rank, and send rank 0's to all (`_zero_init_param`, DeepSpeed 0.19.8). It
    copies only the rank's slice out of it, so the rest may be memory that is never touched, which takes none on the CPU; on a
    GPU it takes that of one parameter at a time.
    """
    import deepspeed

    init: Any = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
    rank, world = dist.get_rank(), dist.get_world_size()

    def make(reader: WeightReader, name: str, dtype: torch.dtype) -> nn.Parameter:
        stored = reader.tensors[name]
        share = -(-stored.numel // world)
        start, stop = min(rank * share, stored.numel), min((rank + 1) * share, stored.numel)
        full = torch.empty(stored.shape, dtype=dtype, device=init.local_device)
        own = full.view(-1)[start:stop]
        if own.device.type == "cpu":
            reader.read_into(own, name, start)
        else:
            own.copy_(reader.read_slice(name, start, stop, dtype))
        parameter: Any = nn.Parameter(full)
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        sharded: nn.Parameter = parameter
        return sharded

    return make


@contextmanager
def node_copy(checkpoint: str) -> Iterator[Path]:
    """A local directory with the files of a checkpoint's `model/`, one for all workers of a node; call it in all of them.

    The directory itself where it is local. A copy from S3 is made by the worker that comes first, in the folder for temporary
    files, and removed when all workers have left the block: what maps its files lives on. An attempt that was killed leaves it
    to the next one. Raises TimeoutError when another worker's download takes too long.
    """
    uri = model_uri(checkpoint)
    if not uri.startswith("s3://"):
        yield Path(uri)
        return
    identity = json.dumps(storage.fingerprint(storage.join(uri, WEIGHTS_FILE)), sort_keys=True)
    name = f"voco-model-{os.getuid()}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder}: belongs to another user")
        with _locked(folder / "lock", uri):
            if not (folder / "complete").exists():
                shutil.rmtree(folder / "model", ignore_errors=True)
                storage.get_directory(uri, folder / "model")
                (folder / "complete").touch()
        yield folder / "model"
        if dist.is_initialized():
            dist.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path, uri: str) -> Iterator[None]:
    """The node's lock for one download; a worker that dies gives it back."""
    end = time.monotonic() + COPY_WAIT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    message = f"{uri}: another worker of this node has been downloading it for {COPY_WAIT_S:.0f} s ({path})"
                    raise TimeoutError(message) from None
                time.sleep(0.1)
        yield
