"""Killed after a checkpoint and resumed, a run ends with the weights of an unbroken run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import world
import yaml
from safetensors.torch import load_file

import pipelines
from voco.errors import Refused
from voco.run import manifest
from voco.store import parquet
from voco.train import checkpoint_files

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = {"epochs": 12, "save_every": 8}  # 5 steps an epoch


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, ray_local):
    root = str(tmp_path_factory.mktemp("resume"))
    world.write_samples(f"{root}/samples", world.sample_rows(37))  # the last step of an epoch is short
    pipelines.run(world.features_job([f"{root}/samples"], f"{root}/features"))
    return root


def job(root, name, **changes):
    return world.sft_job(f"{root}/samples", f"{root}/features", f"{root}/{name}", **{**STEPS, **changes})


def outcome(root, name):
    return load_file(f"{root}/{name}/model/model.safetensors"), parquet.read_table(f"{root}/{name}/metrics.parquet")


def assert_same(root, name, other_name, tolerance=1e-6):
    (weights, metrics), (other_weights, other_metrics) = outcome(root, name), outcome(root, other_name)
    assert weights.keys() == other_weights.keys()
    assert max(float((weights[k] - other_weights[k]).abs().max()) for k in weights) <= tolerance
    assert metrics["step"].to_pylist() == other_metrics["step"].to_pylist() == list(range(60))
    assert metrics["sample_ids_sha256"].to_pylist() == other_metrics["sample_ids_sha256"].to_pylist()
    initial = load_file(f"{root}/{name}/initial/model/model.safetensors")
    assert any(not torch.equal(initial[k], weights[k]) for k in initial)


def first_checkpoint(root, name, deadline_s=400):
    """Wait until a checkpoint is complete."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if list(Path(f"{root}/{name}/checkpoints").glob("step-*/progress.json")):
            return
        time.sleep(0.05)
    raise AssertionError("no checkpoint was written")


def test_driver_killed_under_zero_2_and_continued_on_another_number_of_workers(inputs, ray_local, tmp_path):
    """Two workers become one: the same run, whose steps have the same samples and losses."""
    pipelines.run(job(inputs, "whole2"))
    killed = job(inputs, "killed2")
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(killed.model_dump(exclude_none=True)))
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "run", str(file)],
        env={**os.environ, "RAY_ADDRESS": ray_local, "RAY_AUTH_MODE": "disabled"},
        start_new_session=True,
    )
    try:
        first_checkpoint(inputs, "killed2")
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert manifest.read_manifest(f"{inputs}/killed2") is None
    newest = checkpoint_files.newest(f"{inputs}/killed2/checkpoints")
    before = parquet.read_table(newest.metrics)["seconds"].to_pylist()
    assert newest.workers == 2
    killed = killed.model_copy(update={"resources": killed.resources.model_copy(update={"workers": 1})})
    done = pipelines.run(killed)
    assert done.counts["steps"] == 60
    assert_same(inputs, "whole2", "killed2", tolerance=1e-4)  # sums in another order, over 60 steps
    losses = [outcome(inputs, name)[1]["loss"].to_pylist() for name in ("whole2", "killed2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert outcome(inputs, "killed2")[1]["seconds"].to_pylist()[: len(before)] == before  # continued, did not start again
    assert outcome(inputs, "killed2")[1]["attempt"].to_pylist() == [0] * len(before) + [1] * (60 - len(before))
    assert pipelines.run(killed) == done  # a third run has nothing to do
    with pytest.raises(Refused, match="holds run"):
        pipelines.run(job(inputs, "killed2", learning_rate=0.5))


def test_worker_killed_under_zero_3(inputs, ray_local):
    import threading

    pipelines.run(job(inputs, "whole3", zero_stage=3))
    killed: list[int] = []

    def kill():
        first_checkpoint(inputs, "killed3")
        own = {process.pid for process in psutil.Process().children(recursive=True)}
        for process in psutil.process_iter(["pid", "cmdline"]):
            if "ray::RayTrainWorker" in " ".join(process.info["cmdline"] or []) and process.pid in own:
                killed.append(process.pid)
                process.send_signal(signal.SIGKILL)
                return

    thread = threading.Thread(target=kill)
    thread.start()
    done = pipelines.run(job(inputs, "killed3", zero_stage=3))
    thread.join()
    assert len(killed) == 1
    assert done.counts["steps"] == 60
    assert_same(inputs, "whole3", "killed3")
