"""Two Ray nodes on this machine that share no directory: the second sees an empty one where the test's own lies.

The head is the demo's cluster in a folder of its own. The second node's processes live in a mount namespace (`unshare --mount`)
in which a fresh file system covers the test's directory, with HOME, TMPDIR and working directory inside it. Needs root.
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
def started(place: Path, cpus: int) -> Iterator[Cluster]:
    """A head under `place`, and a second node that cannot see `place`; `cpus` logical CPUs each."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("a second node without the first one's files needs `unshare --mount`, so root")
    home = place / "head-home"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "TMPDIR"):
            patch.setenv(name, str(home))
        head = cluster.start(place / ".demo", cpus=cpus)
    try:
        with another(head, place, cpus):
            yield head
    finally:
        cluster.stop(place / ".demo")


@contextmanager
def another(head: Cluster, place: Path, cpus: int) -> Iterator[None]:
    """One node more, that cannot see `place`."""
    token = Path(head.token_path).read_text().strip()
    hidden, count = shlex.quote(str(place)), len(nodes(head)) + 1
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
    log = (place / f"node{count}.log").open("wb")
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
    """CPUs that placement groups hold, as `ray status` says."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_path}
    ray = str(Path(sys.executable).with_name("ray"))
    told = subprocess.run([ray, "status", "--address", head.gcs], env=environment, capture_output=True, text=True, timeout=60)
    assert " CPU" in told.stdout, told.stderr[-2000:]
    found = re.search(r" CPU \([\d.]+ used of ([\d.]+) reserved in placement groups\)", told.stdout)
    return float(found[1]) if found else 0.0


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
    return _ask(head, "from ray.util.state import list_nodes; found = [n.node_id for n in list_nodes() if n.state == 'ALIVE']")


def nodes_of_actors(head: Cluster, kind: str) -> set[str]:
    """Ids of the nodes on which actors whose class name holds `kind` have run."""
    return set(
        _ask(
            head,
            "from ray.util.state import list_actors; "
            f"found = [a.node_id for a in list_actors(limit=9999) if {kind!r} in a.class_name and a.node_id]",
        )
    )


def _ask(head: Cluster, code: str) -> list[str]:
    """Ray's state API, in a process of its own: the environment says which cluster, and no other test sees it."""
    environment = {**os.environ, "RAY_ADDRESS": head.dashboard, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_path}
    asked = subprocess.run(
        [sys.executable, "-c", f"{code}; print('FOUND', *found)"], env=environment, capture_output=True, text=True, timeout=60
    )
    lines = [line for line in asked.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, asked.stderr[-2000:]
    return lines[0].split()[1:]
