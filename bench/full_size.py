"""LLaVA-665k's size from S3: 665,298 generated rows through ingest and its index, then steps of a tiny model on 4 workers.

python bench/full_size.py [--share 0.01] [--steps 200] [--latency 30] [--workers 4]

Output and inputs of the training lie on a real S3 server on loopback that waits before every answer (bench/object_store.py).
Prints the time from Ray's start to the first step, the share of a step that waits for data, requests and bytes, and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import mix665k
import psutil
import yaml
from object_store import serving
from side_by_side import OUT, QUIET, ROOT, machine

TEXT = {"template": "question_answer"}
TOWER = {"name": "efficientnet_lite0", "image_size": 64}
TRAINING = {"epochs": 1, "global_batch": 32, "micro_batch": 8, "learning_rate": 0.001, "precision": "fp32", "text": TEXT}
STEP = re.compile(r": step (\d+)/")
RATE = 90e6  # bytes a second of one stream


def job(name: str, kind: str, workers: int, inputs: dict[str, Any], **blocks: Any) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "output": f"s3://bucket/{name}", "inputs": inputs, "resources": {"workers": workers},
        "tracking": {"wandb": False}, **blocks,
    }  # fmt: skip


def ingest(name: str, folder: Path) -> dict[str, Any]:
    inputs = {"annotations": f"{folder}/mix.json", "media": f"{folder}/images"}
    return job(name, "ingest", 2, inputs, ingest={"format": "llava_json", "dataset": name, "unit_rows": 10_000})


class Run:
    """A driver process: its lines with the time of each, and the peak memory of every process that it started."""

    def __init__(self, folder: Path, spec: dict[str, Any], environment: dict[str, str]) -> None:
        file = folder / f"{spec['name']}.yaml"
        file.write_text(yaml.safe_dump(spec))
        options: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "start_new_session": True,
        }
        self.started = time.monotonic()
        command = [sys.executable, "-m", "pipelines", "run", str(file)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
        self.lines: list[tuple[float, str]] = []
        self.peaks: dict[int, tuple[str, float]] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def follow(self, steps: int | None = None) -> int:
        """The exit code. The driver is asked to stop, once, at the first line of a step from `steps` on."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic() - self.started, line.rstrip()))
            print(f"{self.lines[-1][0]:8.1f}  {line.rstrip()[:150]}", flush=True)
            step = STEP.search(line)
            if steps is not None and step is not None and int(step[1]) >= steps:
                self.process.send_signal(signal.SIGTERM)
                steps = None
        return self.process.wait()

    def peak(self, word: str) -> float:
        """The largest peak in MiB of the processes whose command line has this word."""
        return max((size for line, size in self.peaks.values() if word in line), default=0.0) / 2**20

    def _watch(self) -> None:
        try:
            driver = psutil.Process(self.process.pid)
            while self.process.poll() is None:
                for process in [driver, *driver.children(recursive=True)]:
                    try:
                        size, line = process.memory_info().rss, " ".join(process.cmdline())
                    except psutil.Error:
                        continue
                    _, before = self.peaks.get(process.pid, ("", 0.0))
                    self.peaks[process.pid] = (line, max(before, float(size)))
                time.sleep(0.5)
        except psutil.NoSuchProcess:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of every source")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--latency", type=float, default=30.0, help="milliseconds of every request")
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=OUT) as scratch:
        folder = Path(scratch)
        expected = mix665k.write(folder / "source", options.share)
        mix665k.write(folder / "small", 0.0004)
        with serving(folder / "s3", options.latency / 1000, RATE) as store:
            environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | QUIET
            environment |= store.environment()
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
            run = Run(folder, ingest("mix", folder / "source"), environment)
            if run.follow():
                return 1
            counts = json.loads((folder / "s3/bucket/mix/manifest.json").read_text())["counts"]
            rows = {"read": counts["read"], "written": counts["written"], **counts["rejected"]}
            correct = rows == expected
            figures |= {"ingest_s": run.lines[-1][0], "ingest_driver_mib": run.peaks[run.process.pid][1] / 2**20}
            llama = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 4, "mlp_width": 128, "vocabulary": 640}
            model = {"llama": llama, "tower": TOWER}
            align = {**TRAINING, "text": {"template": "plain"}}
            for spec in (
                ingest("small", folder / "small"),
                job("align", "align", 1, {"samples": [{"uri": "s3://bucket/small"}]}, model=model, align=align),
            ):
                if Run(folder, spec, environment).follow():
                    return 1
            store.reset()
            inputs = {"samples": [{"uri": "s3://bucket/mix"}], "checkpoint": "s3://bucket/align"}
            sft = {**TRAINING, "share_vision": False, "save_every": options.steps}
            voco = {"method": "voco", "tokens": 1}
            spec = job("train", "image_sft", options.workers, inputs, compression=voco, image_sft=sft)
            run = Run(folder, spec, environment)
            code = run.follow(options.steps)
            figures |= training_figures(run, folder / "s3/bucket/train")
            figures |= {"requests": float(store.requests), "read_mib": store.sent / 2**20}
    print(f"\n{counts['read']:,} rows, exit code of the training {code} (130: stopped after its steps), counts exact: {correct}")
    for name, value in figures.items():
        print(f"  {name:24}{value:12,.2f}")
    work = f"{counts['read']:,} rows, {options.latency:g} ms a request, {options.workers} workers"
    result = {"name": "full-size", "work": work, "correct": correct, "ours": figures, "peers": {}, "ratio": {}}
    (OUT / "full-size.json").write_text(json.dumps({**result, "figures": figures, "machine": machine()}, indent=1) + "\n")
    return 0 if correct and code in (0, 130) else 1


def training_figures(run: Run, output: Path) -> dict[str, float]:
    """The first step's time after Ray's start, shares of waiting, and peaks of memory."""
    import pyarrow.parquet as pq

    ray = next((at for at, line in run.lines if "Started a local Ray" in line or "voco.run" in line), run.lines[0][0])
    (metrics,) = [pq.read_table(path) for path in sorted(output.rglob("metrics.parquet"))[-1:]]
    seconds, wait = metrics["seconds"].to_numpy(), metrics["wait"].to_numpy()
    at, line = next((at, line) for at, line in run.lines if STEP.search(line))
    first = at - float(seconds[1 : int(STEP.search(line)[1])].sum())  # type: ignore[index]
    return {
        "steps": float(len(seconds)),
        "first_step_after_ray_s": first - ray,
        "first_step_after_start_s": first,
        "wait_share": float(wait[1:].sum() / seconds[1:].sum()),
        "driver_mib": run.peaks[run.process.pid][1] / 2**20,
        "worker_mib": run.peak("RayTrainWorker"),
    }


if __name__ == "__main__":
    sys.exit(main())
