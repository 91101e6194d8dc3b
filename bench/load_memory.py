"""`make bench-load`: host memory while a model loads, ours and the earlier build's: peaks, not seconds.

A random Llama of 297 million weights in fp32 (1.2 GB). Under ZeRO-3 on four CPU workers, in fp32 and in bf16:

- `load`: a worker's peak until it has its weights, over the bytes of its shard;
- `start`: its peak until DeepSpeed's engine is ready, over what it has then (shard, gradients, master weights, Adam);
- `teacher`: the same model as the teacher of distillation, over the bytes of its shard and of its complete output head;
- `end`: rank 0 while it writes the trained weights, over the bytes of the complete model.

`driver` is the driver of `align`, which makes the starting model of a pretrained one, over the bytes of the model. Memory counts
as `load_memory_run.py` says: `pss` of workers, `own` of the driver and of rank 0 at the end. The exported weights of both builds
are equal, and in fp32 equal to those that were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from earlier import environment, source
from side_by_side import ROOT, write

WORKERS = 4
HEAD = 32_000 * 1_024  # weights of the output head
LARGEST = 1.5  # of `load`, `start` and `teacher`


def call(folder: Path, *arguments: object, processes: int = 1) -> dict[str, Any]:
    """The result of rank 0 of `processes` of load_memory_run.py, under the source in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "bench" / "load_memory_run.py"), *map(str, arguments)]
    running = []
    for rank in range(processes):
        rendezvous = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = environment(folder, **{name: str(value) for name, value in rendezvous.items()})
        running.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{errors[-4000:]}")
    result: dict[str, Any] = json.loads(outputs[0][0].strip().rsplit("\n", 1)[-1])
    return result


def figures(folder: Path, model: Path, output: Path, parameters: int) -> dict[str, float]:
    """The ratios of one build."""
    driver = call(folder, "driver", model, output / "start")
    ratios = {"driver": driver["own"] / driver["bytes"]}
    for precision, width in (("fp32", 4), ("bf16", 2)):
        ranks = call(folder, "rank", output / "start", output / precision, precision, processes=WORKERS)["ranks"]
        share, head = width * parameters / WORKERS, width * HEAD
        ratios |= {
            f"load {precision}": max(rank["load"]["pss"] for rank in ranks) / share,
            f"start {precision}": max(rank["start"]["pss"] / rank["ready"]["pss"] for rank in ranks),
            f"teacher {precision}": max(rank["teacher"]["pss"] for rank in ranks) / (share + head * (1 - 1 / WORKERS)),
            f"end {precision}": ranks[0]["end"]["own"] / (width * parameters),
        }
        shown = {part: {kind: f"{size / 1e6:.0f}" for kind, size in sizes.items()} for part, sizes in ranks[-1].items()}
        print(f"  last of {WORKERS} workers, {precision}, MB: {shown}", flush=True)
    return ratios


def check_equal(first: Path, second: Path, what: str) -> None:
    import torch
    from safetensors.torch import load_file

    one_side, other = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    if one_side.keys() != other.keys() or not all(torch.equal(tensor, other[name]) for name, tensor in one_side.items()):
        raise SystemExit(f"{what}: weights differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18, help="fewer for a quick look: the limits are for 18")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    builds = {"ours": ROOT, "134c529": source()}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        folder = Path(temporary)
        parameters = call(ROOT, "source", folder / "lm", options.layers)["parameters"]
        ratios = {name: figures(build, folder / "lm", folder / name, parameters) for name, build in builds.items()}
        for part in ("start", "fp32", "bf16"):
            check_equal(folder / "ours" / part, folder / "134c529" / part, part)
        check_equal(folder / "ours" / "start", folder / "ours" / "fp32", "exported")
    own, before = ratios["ours"], ratios["134c529"]
    work = f"{parameters / 1e6:.0f} million weights, ZeRO-3 on {WORKERS} workers: peaks of host memory"
    write("load", work, own, {"134c529": before}, {f"134c529 {name}": before[name] / own[name] for name in own}, load, own)
    missed = [name for name in own if name.startswith(("load", "start", "teacher")) and own[name] > LARGEST]
    if missed:
        raise SystemExit(f"above {LARGEST}: {', '.join(missed)}")


if __name__ == "__main__":
    main()
