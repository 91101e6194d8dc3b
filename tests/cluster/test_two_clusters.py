"""Two Ray clusters on one machine: a training does not notice that the other is started, and its places are freed in its own.

Ray 2.60 asks the state API of the cluster that was started last, whether or not it is its own (voco.train.elastic).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import shapes
import two_nodes
import world
import yaml
from elastic_world import PATIENCE_S, wait_until

from voco.demo import cluster
from voco.demo.cluster import Cluster
from voco.store import storage
from voco.train import checkpoint_files

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster as `ray start` makes it, without the address of its state API in its processes."""
    original = cluster._environment

    def environment(described: Cluster) -> dict[str, str]:
        return {key: value for key, value in original(described).items() if key != "RAY_API_SERVER_ADDRESS"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_environment", environment)
        folder = tmp_path_factory.mktemp("first") / ".demo"
        yield cluster.start(folder, cpus=3)
        cluster.stop(folder)


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Path]:
    """The folder of a second cluster: the test starts and stops it."""
    yield tmp_path / ".demo"
    cluster.stop(tmp_path / ".demo")


def job(root: Path, name: str) -> Path:
    """A sweep of one trial, whose training starts in a process of Ray Tune."""
    world.write_samples(str(root / "samples"), world.sample_rows(37))
    evaluate = {
        "name": "ask", "kind": "evaluate", "inputs": {"samples": [{"uri": str(root / "test")}], "checkpoint": "@train"},
        "evaluate": {"benchmark": "world", "resamples": 100},
    }  # fmt: skip
    world.write_samples(str(root / "test"), world.sample_rows(6, evaluation=True, first=100, text_every=0))
    block = {
        "epochs": 4000, "global_batch": 8, "micro_batch": 4, "learning_rate": 1e-4, "precision": "fp32", "save_every": 20,
        "text": {"template": "question_answer"},
    }  # fmt: skip
    train: dict[str, Any] = {
        "name": "train", "kind": "image_sft", "inputs": {"samples": [{"uri": str(root / "samples")}]}, "image_sft": block,
        "compression": {"method": "voco", "tokens": 1}, "model": shapes.MODEL, "resources": {"workers": 2},
    }  # fmt: skip
    sweep = {"axes": {"compression.tokens": [1]}, "train": train, "evaluate": evaluate}
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, "kind": "sweep", "output": str(root / name), "sweep": sweep}))
    return file


def start(head: Cluster, file: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "RAY_ADDRESS": head.gcs, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_path, "WANDB_MODE": "disabled",
    }  # fmt: skip
    with file.with_suffix(".log").open("ab") as log:
        command = [sys.executable, "-m", "pipelines", "run", str(file)]
        return subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment, stdout=log, stderr=log)


def wait_for_step(file: Path, step: int, driver: subprocess.Popen[bytes]) -> None:
    folder = storage.join(str(file.with_suffix("")), "runs", "1", "train", checkpoint_files.FOLDER)

    def reached() -> bool:
        assert driver.poll() is None, file.with_suffix(".log").read_text()[-6000:]
        newest = checkpoint_files.newest(folder)
        return newest is not None and newest.step >= step

    wait_until(reached, f"step {step}", file.with_suffix(".log").read_text)


def stop(file: Path, driver: subprocess.Popen[bytes]) -> None:
    """Ask the sweep to stop; its trial saves a checkpoint."""
    driver.terminate()
    assert driver.wait(PATIENCE_S) == 130, file.with_suffix(".log").read_text()[-6000:]


def train_processes(head: Cluster, kind: str) -> list[psutil.Process]:
    processes = []
    for process in cluster.members(head.mark):
        try:
            if kind in " ".join(process.cmdline()[:1]):
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def test_training_continues_while_another_cluster_is_started_and_stopped(head: Cluster, tmp_path: Path, second: Path) -> None:
    """Seen with Ray's cleaner: "Placement group was removed", and the workers of a healthy training are destroyed."""
    file = job(tmp_path, "healthy")
    driver = start(head, file)
    wait_for_step(file, 20, driver)
    for _ in range(2):  # started, and started again
        workers = {process.pid for process in train_processes(head, "RayTrainWorker")}
        assert len(workers) == 2
        cluster.start(second, cpus=1)
        time.sleep(6)  # the cleaner looks once a second
        assert {process.pid for process in train_processes(head, "RayTrainWorker")} == workers
        cluster.stop(second)
    stop(file, driver)
    assert "continues at step" not in file.with_suffix(".log").read_text()


def test_a_controller_that_dies_frees_its_places_beside_another_cluster(head: Cluster, tmp_path: Path, second: Path) -> None:
    """With another cluster there from the start, Ray's cleaner takes the controller for dead at once, and cleans nothing."""
    cluster.start(second, cpus=1)
    file = job(tmp_path, "killed")
    driver = start(head, file)
    wait_for_step(file, 20, driver)
    assert two_nodes.reserved(head) == 2  # of three: with these lost, no trial could start again
    (controller,) = train_processes(head, "TrainController")
    controller.kill()
    wait_until(lambda: "continues at step" in file.with_suffix(".log").read_text(), "a new start of the trial")
    assert two_nodes.reserved(head) == 2
    stop(file, driver)
    wait_until(lambda: not train_processes(head, "OwnClusterCleaner"), "the end of the cleaners")
