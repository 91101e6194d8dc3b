"""Join the cluster of the environment, or start a local Ray."""

from __future__ import annotations

import importlib
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from voco.run.logs import delay_stderr, get_logger

log = get_logger(__name__)


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
    import ray  # noqa: F401 - before the thread: two threads must not import the same modules

    importing = threading.Thread(target=_import_early, args=(modules,), daemon=True)
    importing.start()
    _init_ray(in_cluster, cpus)
    importing.join()


def _import_early(modules: Sequence[str]) -> None:
    for name in modules:
        with suppress(Exception):  # it is raised again where the module is used
            importlib.import_module(name)


def _init_ray(in_cluster: bool, cpus: float) -> None:
    import ray

    if in_cluster:
        with delay_stderr():
            ray.init(address="auto", logging_level="WARNING")
        return
    logical = max(os.cpu_count() or 1, int(cpus) + 2)  # more than workers need: a waiting driver must not block one
    log.info("no RAY_ADDRESS: a local Ray with %d logical CPUs, for this run only", logical)
    with delay_stderr():
        ray.init(address="local", num_cpus=logical, include_dashboard=False, logging_level="WARNING")
