"""Two Ray nodes on this machine that share no directory: where the test's directory is, the second node sees an empty one.

The head is the demo's cluster in its own folder. The second node's processes run in a mount namespace (`unshare --mount`)
in which an empty file system covers the test's directory, with HOME, TMPDIR and working directory inside it. Needs root.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from voco.demo import cluster
from voco.demo.cluster import Cluster


@contextmanager
def two_node_cluster(root: Path, cpus: int) -> Iterator[Cluster]:
    """A head under `root`, and a second node that cannot see `root`; `cpus` logical CPUs each."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("a second node without the first node's files needs `unshare --mount`, so root")
    home = root / "head-home"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "TMPDIR"):
            patch.setenv(name, str(home))
        head = cluster.start(root / ".demo", cpus=cpus)
    try:
        with extra_node(head, root, cpus):
            yield head
    finally:
        cluster.stop(root / ".demo")


@contextmanager
def extra_node(head: Cluster, root: Path, cpus: int) -> Iterator[None]:
    """One more node, which cannot see `root`."""
    token = Path(head.token_path).read_text().strip()
    hidden, count = shlex.quote(str(root)), len(nodes(head)) + 1
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", f"--address={head.gcs}", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1",
             "--object-store-memory=200000000", "--disable-usage-stats", "--labels", "side=second"]  # fmt: skip
    script = (
        f"mount -t tmpfs none {hidden} && mkdir -p {hidden}/home {hidden}/tmp {hidden}/.demo/ray && cd {hidden}/home && "
        f"export HOME={hidden}/home TMPDIR={hidden}/tmp && exec {shlex.join(start)}"
    )
    environment = {
        **os.environ, "VOCO_CLUSTER": head.mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1",
        "RAY_worker_register_timeout_seconds": "180", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }  # fmt: skip
    log = (root / f"node{count}.log").open("wb")
    node = subprocess.Popen(
        ["unshare", "--mount", "bash", "-c", script],
        env=environment,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for_nodes(head, node, count)
        yield
    finally:
        node.terminate()
        try:
            node.wait(20)
        except subprocess.TimeoutExpired:
            node.kill()


def reserved(head: Cluster) -> float:
    """CPUs that placement groups hold, as `ray status` reports."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_path}
    ray = str(Path(sys.executable).with_name("ray"))
    status = subprocess.run([ray, "status", "--address", head.gcs], env=environment, capture_output=True, text=True, timeout=60)
    assert " CPU" in status.stdout, status.stderr[-2000:]
    match = re.search(r" CPU \([\d.]+ used of ([\d.]+) reserved in placement groups\)", status.stdout)
    return float(match[1]) if match else 0.0


def _wait_for_nodes(head: Cluster, node: subprocess.Popen[bytes], count: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert node.poll() is None, "the new node ended"
        if len(nodes(head)) == count:
            return
        time.sleep(1)
    raise TimeoutError(f"{count} nodes did not come up")


def nodes(head: Cluster) -> list[str]:
    """Ids of the nodes that are alive."""
    return _ask(head, "from ray.util.state import list_nodes; ids = [n.node_id for n in list_nodes() if n.state == 'ALIVE']")


def nodes_of_actors(head: Cluster, kind: str) -> set[str]:
    """Ids of the nodes on which actors whose class name holds `kind` have run."""
    return set(
        _ask(
            head,
            "from ray.util.state import list_actors; "
            f"ids = [a.node_id for a in list_actors(limit=9999) if {kind!r} in a.class_name and a.node_id]",
        )
    )


def _ask(head: Cluster, code: str) -> list[str]:
    """Ray's state API in a separate process, whose environment names the cluster; this process's environment stays unchanged."""
    environment = {**os.environ, "RAY_ADDRESS": head.dashboard, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_path}
    answer = subprocess.run(
        [sys.executable, "-c", f"{code}; print('IDS', *ids)"], env=environment, capture_output=True, text=True, timeout=60
    )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("IDS")]
    assert lines, answer.stderr[-2000:]
    return lines[0].split()[1:]
