"""Join the cluster of the environment, or start a local Ray."""

from __future__ import annotations

import atexit
import importlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from voco.errors import JobFailed, Refused, message_line
from voco.run.logs import delay_stderr, get_logger
from voco.run.proxies import LOOPBACK, bypass_proxy, is_loopback

log = get_logger(__name__)

STARTS = 3  # of Ray, which gives up after 30 s, a constant of Ray's: a busy machine needs longer
REACH_S = 10.0  # that a cluster may take to accept a connection
SOCKET_BYTES = 107  # of the path of a Unix socket on Linux (108 with its zero; unix(7))
SOCKET_SUFFIX = "/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # what Ray appends, with the longest pid
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def run_in_thread(call: Callable[[], Any]) -> Any:
    """Call in another thread. In the main thread Ray Train would handle SIGINT itself and end without a checkpoint."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def start_ray(cpus: float, modules: Sequence[str] = ()) -> None:
    """Join the cluster of the environment, else start a local one with `cpus` for workers, which ends with this process.

    `modules` are imported while Ray's processes start: afterwards, they would take half of a small job's time.
    Raises JobFailed when Ray does not start or the cluster does not answer, Refused when no path is short enough for its sockets.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # the driver's C++ part warns about every actor pool of Ray Data (`max_restarts`), past sys.stderr; errors come as exceptions
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    in_cluster = "RAY_ADDRESS" in os.environ
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray's own default depends on what ran on this machine before, so it is always set
        has_token = (
            "RAY_AUTH_TOKEN" in os.environ
            or "RAY_AUTH_TOKEN_PATH" in os.environ
            or Path("~/.ray/auth_token").expanduser().exists()
        )
        os.environ["RAY_AUTH_MODE"] = "token" if has_token or not in_cluster else "disabled"
        if not in_cluster and not has_token:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    bypass_proxy(*LOOPBACK)
    temp_dir = None if in_cluster else short_temp_dir()  # before the import: its folder is then removed after Ray's end
    import ray  # noqa: F401 - before the thread: two threads must not import the same modules

    importing = threading.Thread(target=_import_early, args=(modules,), daemon=True)
    importing.start()
    if in_cluster:
        _join_cluster(os.environ["RAY_ADDRESS"])
    else:
        _start_local(cpus, temp_dir)
    importing.join()


def _import_early(modules: Sequence[str]) -> None:
    for name in modules:
        with suppress(Exception):  # it is raised again where the module is used
            importlib.import_module(name)


def short_temp_dir() -> str | None:
    """None where Ray's own choice of a folder for its sessions is good; else a short link to it, removed with this process.

    Ray takes RAY_TMPDIR, TMPDIR or /tmp, and the paths of its sockets in there must not exceed SOCKET_BYTES.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    folder = os.path.join(os.path.abspath(os.environ.get(variable, "/tmp")), "ray")
    length = len(os.fsencode(folder + SOCKET_SUFFIX))
    if length <= SOCKET_BYTES:
        return None
    try:
        os.makedirs(folder, exist_ok=True)
        parent = tempfile.mkdtemp(prefix="voco-", dir=next(path for path in SHORT_FOLDERS if os.access(path, os.W_OK)))
    except (OSError, StopIteration) as error:
        too_long = f"Ray's sockets in {folder} would have paths of {length} bytes, expected at most {SOCKET_BYTES}"
        raise Refused(f"{variable}: {too_long}; set RAY_TMPDIR to a shorter folder that can be written") from error
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    link = os.path.join(parent, "ray")
    os.symlink(folder, link)
    return link


def _join_cluster(address: str) -> None:
    """Join the cluster of RAY_ADDRESS. Raises JobFailed when it does not answer."""
    import ray

    failure = f"RAY_ADDRESS={address}: no Ray cluster answers there"
    try:
        _reach(address)
    except Exception as error:
        raise JobFailed(f"{failure}: {message_line(error)}") from error
    try_starts(failure, lambda: ray.init(address="auto", logging_level="WARNING"))


def _reach(address: str) -> None:
    """Wait until the server at HOST:PORT speaks gRPC. Raises ConnectionError after REACH_S; Ray itself tries for minutes."""
    import grpc  # type: ignore[import-untyped]
    import ray

    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):  # auto; or a handshake first
        return
    # Ray itself takes the address in the network for one on the loopback
    hosts = [host, ray.util.get_node_ip_address()] if is_loopback(host.strip("[]")) else [host]
    channels = [grpc.insecure_channel(f"{name}:{port}", options=[("grpc.enable_http_proxy", 0)]) for name in hosts]
    ready = [grpc.channel_ready_future(channel) for channel in channels]
    deadline = time.monotonic() + REACH_S
    while not any(future.done() for future in ready) and time.monotonic() < deadline:
        time.sleep(0.02)
    reached = any(future.done() for future in ready)
    for future, channel in zip(ready, channels, strict=True):
        future.cancel()
        channel.close()
    if not reached:
        raise ConnectionError(
            f"nothing that speaks gRPC in {REACH_S:.0f} s; expected HOST:PORT of `ray start`, by default port 6379"
        )


def _start_local(cpus: float, temp_dir: str | None) -> None:
    """Start Ray on this machine. Raises JobFailed when it does not start."""
    import ray

    logical = max(os.cpu_count() or 1, int(cpus) + 2)  # more than workers need: a waiting driver must not block one
    log.info("no RAY_ADDRESS: a local Ray with %d logical CPUs, for this run only", logical)
    options: dict[str, Any] = {"num_cpus": logical, "include_dashboard": False, "logging_level": "WARNING", "_temp_dir": temp_dir}
    try_starts("Ray did not start on this machine", lambda: ray.init(address="local", **options))


def try_starts(failure: str, init: Callable[[], Any]) -> None:
    """Call `ray.init` up to STARTS times, with a line for each failure. Raises JobFailed for the last, or one that stays."""
    import ray

    for start in range(1, STARTS + 1):
        running = _children()
        try:
            with delay_stderr(shown_on_error=False):
                init()
            return
        except Exception as error:
            if start == STARTS or _stays(error):
                raise JobFailed(f"{failure}: {message_line(error)}") from error
            log.warning("%s (%s); trying again", failure, message_line(error, 120))
            with suppress(Exception):  # of what is half started
                ray.shutdown()
            _end_children(running)


def _stays(error: Exception) -> bool:
    """True for a failure that another try would not change: a folder or the right to it, no cluster, a token, Ray's version."""
    import ray

    if (isinstance(error, OSError) and error.errno is not None) or isinstance(error, ray.exceptions.AuthenticationError):
        return True
    return any(words in str(error) for words in ("Could not find any running Ray instance", "Version mismatch"))


def _children() -> set[Any]:
    import psutil

    return set(psutil.Process().children(recursive=True))


def _end_children(running: set[Any]) -> None:
    """End the processes that this one started since it had `running`: a start that failed leaves them, and they slow the next."""
    import psutil

    started = _children() - running
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=5)
