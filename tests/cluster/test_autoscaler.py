"""Ray's real autoscaler (v2) on this machine: an ingest job starts the workers it needs, from none, and they end after it.

Only the cloud is simulated: Ray's `FakeMultiNodeProvider` starts a real raylet for every VM that the autoscaler requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ingest import source
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from cluster import spot_notice
from voco.demo.cluster import free_ports, members
from voco.run import units
from voco.run.units import POOL

ROOT = Path(__file__).parents[2]
STORE = 80 << 20  # bytes, of each node's object store
WORKERS = 2
EMPTY: dict[str, Any] = {
    "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": [], "rsync_filter": [],
    "initialization_commands": [], "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
    "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts_sync_continuously": False,
}  # fmt: skip


def cluster_config(address: str) -> dict[str, Any]:
    """A small cluster like those in `cluster/`: a head without CPUs, CPU nodes with one CPU, and GPU nodes that have CPUs too."""
    return {
        **EMPTY,
        "cluster_name": "voco-test",
        "max_workers": WORKERS + 1,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10,
        "auth": {"ssh_user": "x"},
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "gcs_address": address,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": 1, "object_store_memory": STORE}, "labels": {POOL: "cpu"},
                "node_config": {}, "min_workers": 0, "max_workers": WORKERS,
            },
            "gpu": {
                "resources": {"CPU": 4, "GPU": 1, "object_store_memory": STORE}, "labels": {POOL: "gpu"},
                "node_config": {}, "min_workers": 0, "max_workers": 1,
            },
        },
    }  # fmt: skip


@dataclass(frozen=True)
class Head:
    address: str
    environment: dict[str, str]
    node_log: Path  # what watch_nodes.py prints

    def nodes(self) -> list[list[dict[str, Any]]]:
        """The live workers at each poll so far."""
        polls = [json.loads(line) for line in self.node_log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [[node for node in poll if node.get(POOL)] for poll in polls]

    def wait_for(self, workers: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not (polls := self.nodes()) or len(polls[-1]) != workers:
            assert time.monotonic() < deadline, f"{len(polls[-1]) if polls else 'no'} workers, expected {workers}"
            time.sleep(0.3)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head with separate ports, token and directory. Afterwards every process with its mark is killed."""
    folder = Path(tempfile.mkdtemp(prefix="voco-"))  # short, because a socket's path has at most 107 bytes
    mark = secrets.token_hex(8)
    gcs, dashboard, agent, agent_grpc, runtime_env, metrics, client = free_ports(7)
    address = f"127.0.0.1:{gcs}"
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster_config(address)))
    (folder / "token").write_text(secrets.token_hex(32))
    outside = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = outside | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "VOCO_CLUSTER": mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_register_timeout_seconds": "180",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
    }
    autoscaler = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--autoscaling-config={folder / 'cluster.yaml'}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}",
        f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--object-store-memory={STORE}",
        f"--temp-dir={folder / 'ray'}", "--disable-usage-stats",
    ]  # fmt: skip
    try:
        with (folder / "head.log").open("wb") as log, (tmp_path / "nodes").open("wb") as node_log:
            subprocess.Popen(command, env=environment | autoscaler, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            watch = [sys.executable, str(Path(__file__).with_name("watch_nodes.py")), address]
            subprocess.Popen(watch, env=environment, stdout=node_log, stderr=subprocess.DEVNULL)
        yield Head(address, environment, tmp_path / "nodes")
    finally:
        _end(mark)
        shutil.rmtree(folder, ignore_errors=True)


def _end(mark: str) -> None:
    """Kill every process that the head, its autoscaler and its drivers started, until no new one appears."""
    deadline = time.monotonic() + 30
    while left := members(mark):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        assert time.monotonic() < deadline, [item.pid for item in left]


@pytest.mark.cluster
def test_ingest_scales_a_cluster_up_from_no_workers_and_back(head: Head, tmp_path: Path) -> None:
    source.write(tmp_path / "source", *source.good(60, 60))
    job = source.job(tmp_path / "source", tmp_path / "out", workers=WORKERS, unit_rows=10, in_process_rows=0)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(exclude_none=True)))
    head.wait_for(0, 60)
    driver = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", str(tmp_path / "job.yaml")],
        env=head.environment | {"RAY_ADDRESS": head.address},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert driver.returncode == 0, driver.stdout[-3000:] + driver.stderr[-3000:]
    polls = head.nodes()
    assert polls[0] == []
    assert max(map(len, polls)) == WORKERS
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["counts"]["read"], manifest["counts"]["written"]) == (60, 60)
    assert len(source.table(tmp_path / "out", "samples")) == 60
    head.wait_for(0, 90)
    assert {node[POOL] for poll in head.nodes() for node in poll} == {"cpu"}  # no GPU node, though those have CPUs too


@pytest.mark.cluster
def test_what_the_autoscaler_cannot_add_is_refused_at_once_and_what_it_can_is_not(head: Head, tmp_path: Path) -> None:
    """The GPU nodes have one GPU each and there is at most one of them; none is alive."""
    source.write(tmp_path / "source", *source.good(10, 10))
    head.wait_for(0, 60)
    for gpus, accelerator, code in ((2, None, 2), (1, "A100", 2), (1, None, 0)):
        job = source.job(tmp_path / "source", tmp_path / f"out{code}", in_process_rows=0).model_dump(exclude_none=True)
        job["resources"] = {"gpus_per_worker": gpus} | ({"accelerator": accelerator} if accelerator else {})
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        driver = subprocess.run(
            [sys.executable, "-m", "pipelines", "run", str(tmp_path / "job.yaml")],
            env=head.environment | {"RAY_ADDRESS": head.address},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert driver.returncode == code, driver.stdout[-2000:] + driver.stderr[-2000:]
        if code:
            needs = f"ingest-test needs a worker with 1 CPU, {gpus} GPU" + (f", {accelerator}" if accelerator else "")
            assert f"resources: {needs}; the cluster has 1 node with 0 GPU, at most 0 CPU on a node" in driver.stderr
            assert driver.stderr.endswith("its autoscaler cannot add enough\n")
            assert head.nodes()[-1] == []  # nothing was started for it


HOLD = """
import sys, time, ray
ray.init(address="auto", logging_level="ERROR")
work = ray.remote(num_cpus=1, label_selector={%r: %r})(lambda: time.sleep(600))
tasks = [work.remote() for _ in range(3)]
time.sleep(600)
"""


@pytest.mark.cluster
def test_the_label_keeps_work_off_gpu_nodes_and_a_spot_notice_drains_a_node(head: Head) -> None:
    """Three tasks for two CPU nodes: without the selector the third would start the GPU node."""
    ((label, value),) = units.CPU_WORK.items()
    head.wait_for(0, 60)
    environment = head.environment | {"RAY_ADDRESS": head.address}
    subprocess.Popen([sys.executable, "-c", HOLD % (label, value)], env=environment)
    head.wait_for(WORKERS, 60)
    time.sleep(5)  # five rounds of the autoscaler
    last = head.nodes()[-1]
    assert [node[POOL] for node in last] == ["cpu"] * WORKERS
    assert not any(node["draining"] for node in last)
    code = "import sys, spot_notice; spot_notice.drain(sys.argv[1], sys.argv[2], 60)"
    environment["PYTHONPATH"] = str(Path(spot_notice.__file__).parent)
    subprocess.run([sys.executable, "-c", code, head.address, last[0]["id"]], env=environment, check=True, timeout=60)
    deadline = time.monotonic() + 20
    while not any(node["draining"] for node in head.nodes()[-1] if node["id"] == last[0]["id"]):
        assert time.monotonic() < deadline
        time.sleep(0.3)
