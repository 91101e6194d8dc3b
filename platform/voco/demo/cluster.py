"""The demo's local Ray cluster, with its own ports, token and temporary directory; its state is in one folder.

It never touches another Ray on the machine: each of its processes has `VOCO_CLUSTER=<mark>` in its environment, and `stop`
ends only those. `cluster.json` in the folder has the addresses; a later `start` reuses only the cluster described there.

    python -m voco.demo.cluster stop      the command of `make demo-stop`
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from voco.errors import JobFailed
from voco.run.ray_init import STARTS

FOLDER = Path(".demo")
LOGICAL_CPUS = 6  # may be more than the real CPUs: a driver that only waits must not keep its workers from starting
OBJECT_STORE_BYTES = 500 << 20
IDLE_PROCESSES = 16  # Ray ends idle ones above this number: each new one imports torch again, for up to ten CPU seconds
# glibc returns large freed blocks to the system, and a training step on a CPU asks for them again: a sixth of its time
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
SOCKET_SUFFIX = 66  # "/session_<date>_<time>_<micros>_<pid>/sockets/plasma_store"; a socket path has at most 107 bytes
START_S = 90.0  # that Ray may take to start
NOT_STARTED = -1  # the pid in `cluster.json` until the process exists


@dataclass(frozen=True)
class Cluster:
    """A running cluster: the content of `cluster.json`. The token itself is only in the file at `token_path`."""

    gcs: str  # host:port, for ray.init
    dashboard: str  # http://host:port, for the Jobs API
    token_path: str
    temp_dir: str  # contains session_<date>_<pid>/
    pid: int  # of `ray start --block`
    mark: str  # value of VOCO_CLUSTER in the environment of every process


def start(folder: Path = FOLDER, cpus: int = LOGICAL_CPUS) -> Cluster:
    """The folder's running cluster, or a new one. Prints the dashboard's address and the seconds that starting took.

    Raises JobFailed when Ray does not respond within START_S, STARTS times.
    """
    folder = folder.absolute()
    running = read_cluster(folder)
    if running is not None and alive(running):
        print(f"Ray cluster is already running: dashboard {running.dashboard}", flush=True)
        return running
    started = time.monotonic()
    for number in range(1, STARTS + 1):
        stop(folder)
        cluster = _launch(folder, cpus)
        if _responds_in_time(cluster):
            break
        stop(folder)
        failure = f"Ray did not start in {time.monotonic() - started:.0f} s"
        if number == STARTS:
            raise JobFailed(f"{failure}; see {folder / 'ray.log'}")
        print(f"{failure}; starting it again", flush=True)
    seconds = time.monotonic() - started
    print(f"Ray cluster started in {seconds:.1f} s: dashboard {cluster.dashboard}, token in {cluster.token_path}", flush=True)
    return cluster


def _responds_in_time(cluster: Cluster) -> bool:
    """Wait until the cluster responds and its node has joined, which Ray gives 30 s; False when it ends, or after START_S."""
    deadline = time.monotonic() + START_S
    while not (responds(cluster) and alive_nodes(cluster)):
        if _has_ended(cluster.pid) or time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def stop(folder: Path = FOLDER) -> int:
    """End the folder's cluster and everything that it started; returns the number of processes.

    `ray start --block` gets a signal first and ends its children itself; processes that are left after that are killed.
    """
    folder = folder.absolute()
    cluster = read_cluster(folder)
    if cluster is None:
        return 0
    processes = set(members(cluster.mark))
    for process in processes:
        if process.pid == cluster.pid:
            _signal(process, hard=False)
    psutil.wait_procs(processes, timeout=8)
    remaining = {process for process in processes if _runs(process)} | set(members(cluster.mark))
    deadline = time.monotonic() + 20
    while remaining:
        if time.monotonic() > deadline:
            raise JobFailed(f"these processes of the cluster did not end: {', '.join(str(process.pid) for process in remaining)}")
        processes |= remaining
        for process in remaining:
            _signal(process, hard=True)
        psutil.wait_procs(remaining, timeout=3)
        remaining = {process for process in processes if _runs(process)} | set(members(cluster.mark))
    (folder / "cluster.json").unlink(missing_ok=True)
    return len(processes)


def write_owner(folder: Path = FOLDER) -> None:
    """Record that this process runs the demo, for `stop_owner`."""
    folder.mkdir(parents=True, exist_ok=True)
    this = psutil.Process()
    (folder / "owner.json").write_text(json.dumps({"pid": this.pid, "created": this.create_time()}))


def stop_owner(folder: Path = FOLDER, wait_s: float = 100.0) -> bool:
    """Interrupt the process that runs the demo, as Ctrl-C would, and wait for its end; False when there is none."""
    file = folder / "owner.json"
    owner = json.loads(file.read_text()) if file.exists() else {"pid": NOT_STARTED, "created": 0}
    try:
        process = psutil.Process(owner["pid"]) if owner["pid"] != NOT_STARTED else None
        if process is None or process.create_time() != owner["created"]:
            return False
        process.send_signal(signal.SIGINT)
        process.wait(wait_s)
    except psutil.NoSuchProcess:
        return False
    return True


def read_cluster(folder: Path = FOLDER) -> Cluster | None:
    """The cluster of `cluster.json`, running or not; None without that file."""
    file = folder / "cluster.json"
    return Cluster(**json.loads(file.read_text())) if file.exists() else None


def alive(cluster: Cluster) -> bool:
    """True when its process exists (and is not another one with the same pid) and the dashboard accepts its token."""
    if cluster.pid == NOT_STARTED:
        return False
    try:
        process = psutil.Process(cluster.pid)
        return process.environ().get("VOCO_CLUSTER") == cluster.mark and responds(cluster)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def responds(cluster: Cluster) -> bool:
    """True when the dashboard answers a request with the cluster's token."""
    return fetch(cluster, "/api/jobs/") is not None


def alive_nodes(cluster: Cluster) -> list[str]:
    """Ids of the nodes that have joined and are alive; none where the dashboard does not answer."""
    try:
        nodes = json.loads(fetch(cluster, "/api/v0/nodes?limit=100") or b"{}")["data"]["result"]["result"]
        return [node["node_id"] for node in nodes if node["state"] == "ALIVE"]
    except (LookupError, TypeError, ValueError):
        return []


def fetch(cluster: Cluster, path: str) -> bytes | None:
    """The dashboard's answer to a request with the cluster's token; None when there is none."""
    token = Path(cluster.token_path).read_text().strip()
    request = urllib.request.Request(f"{cluster.dashboard}{path}", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bytes(answer.read()) if answer.status == 200 else None
    except (urllib.error.URLError, OSError):
        return None


def members(mark: str) -> list[psutil.Process]:
    """Every process with the mark in its environment, and all their descendants.

    The descendants are needed because Ray renames its workers, which overwrites the environment that the system shows.
    """
    processes: set[psutil.Process] = set()
    for process in psutil.process_iter():
        try:
            if _runs(process) and process.environ().get("VOCO_CLUSTER") == mark:
                processes |= {process, *process.children(recursive=True)}
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return [process for process in processes if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _has_ended(pid: int) -> bool:
    try:
        return not _runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def _signal(process: psutil.Process, hard: bool) -> None:
    try:
        process.kill() if hard else process.terminate()
    except psutil.NoSuchProcess:
        return


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below the range that the kernel gives to outgoing connections."""
    listeners: list[socket.socket] = []
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(20_000, 32_000)
        listener = socket.socket()
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            listener.close()
            continue
        listeners.append(listener)
        ports.append(port)
    for listener in listeners:
        listener.close()
    return ports


def _launch(folder: Path, cpus: int) -> Cluster:
    folder.mkdir(parents=True, exist_ok=True)
    token_path = folder / "token"
    token_path.unlink(missing_ok=True)
    with open(os.open(token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(secrets.token_hex(32))
    temp_dir = _temp_dir(folder)
    mark = secrets.token_hex(8)
    gcs, dashboard, agent, agent_grpc, runtime_env, metrics, client = free_ports(7)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={gcs}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
        f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={temp_dir}", "--disable-usage-stats",
    ]  # fmt: skip
    planned = Cluster(
        gcs=f"127.0.0.1:{gcs}",
        dashboard=f"http://127.0.0.1:{dashboard}",
        token_path=str(token_path),
        temp_dir=str(temp_dir),
        pid=NOT_STARTED,
        mark=mark,
    )
    _write_cluster(folder, planned)  # before the process starts: after a kill, `stop` must find it by its mark
    with open(folder / "ray.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(planned),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    cluster = replace(planned, pid=process.pid)
    _write_cluster(folder, cluster)
    return cluster


def _write_cluster(folder: Path, cluster: Cluster) -> None:
    file = folder / "cluster.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(cluster), indent=1) + "\n")
    partial.replace(file)


def _environment(cluster: Cluster) -> dict[str, str]:
    """The environment of the cluster, and so of every driver and worker in it."""
    other_cluster = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
    inherited = {key: value for key, value in os.environ.items() if key not in other_cluster}
    return (
        inherited
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "VOCO_CLUSTER": cluster.mark,
            "RAY_API_SERVER_ADDRESS": cluster.dashboard,  # else the state API asks the cluster that started last
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": cluster.token_path,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_prestart_worker_first_driver": "0",  # a job cannot use idle workers without its environment
            "RAY_worker_register_timeout_seconds": "180",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each training; nobody takes this machine away
            "RAY_DEDUP_LOGS": "0",  # it takes the progress of two trials for the same line
            "RAY_num_workers_soft_limit": str(IDLE_PROCESSES),
            "OMP_NUM_THREADS": "1",
        }
        | KEEP_FREED_MEMORY
    )


def _temp_dir(folder: Path) -> Path:
    """An empty directory for Ray's sessions, or a short link to it when its path is too long for a socket."""
    real = folder / "ray"
    shutil.rmtree(real, ignore_errors=True)
    real.mkdir()
    if len(str(real)) + SOCKET_SUFFIX <= 107:
        return real
    link = Path(tempfile.mkdtemp(prefix="voco-", dir="/tmp")) / "ray"  # TMPDIR may be the long part
    link.symlink_to(real)
    return link


def main(arguments: list[str]) -> int:
    """`start` or `stop` for the cluster in `.demo/`."""
    if arguments == ["start"]:
        start()
    elif arguments == ["stop"]:
        interrupted = stop_owner()
        ended = stop()
        cluster = f"its Ray cluster had {ended} processes left" if ended else "no Ray cluster of it is running"
        print(f"The demo {'was interrupted' if interrupted else 'is not running'}; {cluster}")
    else:
        print("usage: python -m voco.demo.cluster start | stop", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
