"""A cluster whose nodes come and go on this machine, a training on it, and every way in which the training is interrupted.

The head has no room for workers, each further node has room for one. All nodes are real: `ray start --block` with all that it
starts. Used by tests/cluster/test_interruptions.py and bench/interruptions.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import shapes
import world
import yaml

from voco.demo import cluster
from voco.demo.cluster import Cluster
from voco.store import parquet, storage
from voco.train import checkpoint_files

DRAIN_S = 25  # that a node has after SIGTERM
SAVE_EVERY = 40  # steps
PATIENCE_S = 400.0  # for anything on a busy machine
INTERRUPTIONS = ("worker killed", "driver killed", "node drained", "node joins", "node lost")
# a rate at which hundreds of steps do not make more of the rounding of sums in another order
BLOCK: dict[str, Any] = {
    "epochs": 4000, "global_batch": 8, "micro_batch": 4, "learning_rate": 1e-5, "precision": "fp32", "zero_stage": 2,
    "save_every": SAVE_EVERY, "text": {"template": "question_answer"},
}  # fmt: skip
LLAMA = shapes.llama(layers=4, width=128, heads=4, kv_heads=4, mlp_width=256)  # steps of several hundredths of a second


class Node:
    """A Ray node with one logical CPU, in separate processes."""

    def __init__(self, head: Cluster, log: Path) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        self._file = log
        self._command = [
            ray, "start", f"--address={head.gcs}", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1",
            "--object-store-memory=100000000", "--disable-usage-stats",
        ]  # fmt: skip
        self._environment = {
            **os.environ, "VOCO_CLUSTER": head.mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_path,
            "OMP_NUM_THREADS": "1", "RAY_worker_register_timeout_seconds": "180",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
        }  # fmt: skip
        self.start()

    def log(self) -> str:
        """Since the last start."""
        return self._file.read_text(errors="replace")

    def start(self) -> None:
        with self._file.open("wb") as out:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def drain(self) -> None:
        """What a pod's eviction does: SIGTERM, upon which Ray drains the node before it ends."""
        self.process.terminate()

    def kill(self) -> None:
        """What a machine does that loses its power."""
        root = psutil.Process(self.process.pid)
        for process in [root, *root.children(recursive=True)]:
            process.kill()
        self.process.wait(20)


class World:
    """The cluster and the runs on it; `names` are outputs and job files under `directory`."""

    def __init__(self, head: Cluster, directory: Path) -> None:
        self.head, self.directory = head, directory
        self.nodes: list[Node] = []
        self.drivers: list[subprocess.Popen[bytes]] = []
        world.write_samples(str(directory / "samples"), world.sample_rows(37))  # the last step of an epoch is short

    def add_node(self) -> Node:
        """A node more; it may still be starting."""
        node = Node(self.head, self.directory / f"node{len(self.nodes)}.log")
        self.nodes.append(node)
        return node

    def wait_for_nodes(self, count: int) -> None:
        """Wait until so many are there. One that did not start within Ray's 30 s is started again."""

        def joined() -> bool:
            for node in self.nodes:
                if node.process.poll() is not None:
                    node.start()
            return len(cluster.alive_nodes(self.head)) == count + 1

        wait_until(joined, f"{count} nodes", pause_s=3.0)

    def start(self, name: str, workers: Any, **changes: Any) -> subprocess.Popen[bytes]:
        """Start the driver of a training, or start it again."""
        raw = {
            "name": "train", "kind": "image_sft", "output": str(self.directory / name),
            "inputs": {"samples": [{"uri": str(self.directory / "samples")}]}, "resources": {"workers": workers},
            "compression": {"method": "voco", "tokens": 1}, "model": {"llama": LLAMA, "tower": shapes.TOWER},
            "image_sft": {**BLOCK, **changes},
        }  # fmt: skip
        file = self.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(raw))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {
            "RAY_ADDRESS": self.head.gcs, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": self.head.token_path,
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1", "WANDB_MODE": "disabled",
        }  # fmt: skip
        with file.with_suffix(".log").open("ab") as log:
            command = [sys.executable, "-m", "pipelines", "run", str(file)]
            driver = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment, stdout=log, stderr=log)
        self.drivers.append(driver)
        return driver

    def log(self, name: str) -> str:
        file = self.directory / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def saved_step(self, name: str) -> int:
        """Steps of the newest complete checkpoint."""
        newest = checkpoint_files.newest(storage.join(str(self.directory / name), checkpoint_files.FOLDER))
        return 0 if newest is None else newest.step

    def wait_for_step(self, name: str, step: int, driver: subprocess.Popen[bytes]) -> None:
        """Wait until a checkpoint of at least so many steps is complete."""

        def reached() -> bool:
            assert driver.poll() is None, self.log(name)[-6000:]
            return self.saved_step(name) >= step

        wait_until(reached, f"step {step}", lambda: self.log(name))

    def wait_for_restart(self, name: str, attempt: int, driver: subprocess.Popen[bytes]) -> None:
        """Wait until workers that started after this attempt have saved twice."""

        def restarted() -> bool:
            for node in self.nodes:  # a node that joins and did not start within Ray's 30 s
                if node.process.poll() == 1 and "timed out during startup" in node.log():
                    node.start()
            assert driver.poll() is None, self.log(name)[-6000:]
            return self.attempt(name) > attempt

        wait_until(restarted, f"attempt {attempt + 1}", lambda: self.log(name))
        self.wait_for_step(name, self.saved_step(name) + SAVE_EVERY, driver)

    def attempt(self, name: str) -> int:
        """How often the workers had started again when the newest checkpoint was written."""
        return int(self.metrics(name)[-1]["attempt"])

    def stop(self, name: str, driver: subprocess.Popen[bytes]) -> None:
        """Ask the run to stop, which saves a checkpoint."""
        driver.terminate()
        assert driver.wait(PATIENCE_S) == 130, self.log(name)[-6000:]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Of all steps up to the newest complete checkpoint."""
        newest = checkpoint_files.newest(storage.join(str(self.directory / name), checkpoint_files.FOLDER))
        assert newest is not None
        return parquet.read_table(newest.metrics).to_pylist()

    def workers(self) -> list[psutil.Process]:
        """Ray Train's workers."""
        return [process for process in cluster.members(self.head.mark) if "RayTrainWorker" in _title(process)]

    def node_of_worker(self) -> Node:
        """A node that runs a worker now."""
        running = {process.pid for process in self.workers()}
        for node in self.nodes:
            if node.process.poll() is None:
                below = {process.pid for process in psutil.Process(node.process.pid).children(recursive=True)}
                if running & below:
                    return node
        raise AssertionError("no node runs a worker")


def wait_until(condition: Callable[[], bool], what: str, text: Callable[[], str] = str, pause_s: float = 0.2) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}: {text()[-6000:]}"
        time.sleep(pause_s)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


@contextmanager
def elastic_cluster(root: Path) -> Iterator[World]:
    """A head without room for workers. Whatever is started ends with it."""
    home = root / "home"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        head = cluster.start(root / ".demo", cpus=0)
    elastic = World(head, root)
    try:
        yield elastic
    finally:
        for driver in elastic.drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        for node in elastic.nodes:
            if node.process.poll() is None:
                node.kill()
        cluster.stop(root / ".demo")


def interrupt(elastic: World, name: str, how: str, driver: subprocess.Popen[bytes]) -> tuple[float, subprocess.Popen[bytes]]:
    """Do it. Returns when it happened, in Unix seconds, and the run's driver after it."""
    happened = time.time()
    if how == "worker killed":
        elastic.workers()[0].kill()
    elif how == "driver killed":
        driver.kill()
        driver.wait()
        return happened, elastic.start(name, RANGE)
    elif how == "node joins":
        elastic.add_node()
    elif how == "node drained":
        elastic.node_of_worker().drain()
    else:
        elastic.node_of_worker().kill()
    return happened, driver


RANGE = {"min": 1, "max": 2, "resize_every_s": 3.0}


def lost_seconds(rows: list[dict[str, Any]], happened: float) -> tuple[float, int]:
    """Seconds from an event to the first step beyond those that were done before it, and the steps that were done twice.

    `rows` are the metrics of the run, which have no row of a step that was done again. So the last step before the event is
    reckoned from the last row that stayed and the time of a step.
    """
    before = [row for row in rows if row["time"] < happened]
    after = [row for row in rows if row["time"] >= happened]
    attempt = before[-1]["attempt"]
    restarted = [row for row in after if row["attempt"] > attempt]
    stayed = [row for row in after if row["attempt"] == attempt]  # steps after the event that a checkpoint has
    last = (before + stayed)[-1]
    step_s = sum(row["seconds"] for row in before[-20:]) / len(before[-20:])
    done = 0 if stayed else math.floor((happened - last["time"]) / step_s)
    first_new = min(restarted, key=lambda row: abs(row["step"] - (last["step"] + done + 1)))
    start = last["time"] if stayed else happened
    return float(first_new["time"] - start), done
