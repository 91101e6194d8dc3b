"""The demo's cluster ends with the process that started it, also after SIGKILL and while Ray is still starting."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from voco.demo import cluster

ROOT = Path(__file__).parents[2]
OWNER = """
import sys, time
from pathlib import Path
from voco.demo import cluster, guard
folder = Path(sys.argv[1])
guard.stop_with_this_process(folder)
cluster.start(folder, cpus=2)
print("started", flush=True)
time.sleep(600)
"""


def owner(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}"}
    command = [sys.executable, "-c", OWNER, str(folder)]
    return subprocess.Popen(
        command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_no_process(mark: str) -> None:
    deadline = time.monotonic() + 120
    while cluster.members(mark):
        assert time.monotonic() < deadline, [process.cmdline() for process in cluster.members(mark)]
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_running_cluster_ends_with_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    process = owner(tmp_path / ".demo")
    assert process.stdout is not None
    while process.stdout.readline() != "started\n":
        assert process.poll() is None
    running = cluster.read_cluster(tmp_path / ".demo")
    assert running is not None
    assert len(cluster.members(running.mark)) > 5
    os.killpg(process.pid, how)
    process.wait(30)
    wait_for_no_process(running.mark)
    file = tmp_path / ".demo" / "cluster.json"
    deadline = time.monotonic() + 30
    while file.exists():  # it goes last
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.ray
def test_a_cluster_that_is_starting_ends_too(tmp_path: Path) -> None:
    process, file = owner(tmp_path / ".demo"), tmp_path / ".demo" / "cluster.json"
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    mark = json.loads(file.read_text())["mark"]
    time.sleep(random.uniform(0, 2))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    deadline = time.monotonic() + 120
    while file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not cluster.members(mark)
