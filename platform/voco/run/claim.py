"""One driver for each run on a cluster, and how it is asked to stop.

A driver claims its run with a named Ray actor, `voco-run-<run id>`, which dies with the driver. The actor carries the stop
flag: SIGTERM or SIGINT on the driver sets it, and training workers check it between steps. Ray is imported only where a run
is claimed or checked, so other commands need not load it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

from voco.errors import Refused

NAMESPACE = "voco"
STOP_WAIT_S = 120  # seconds that a stopped driver has for its checkpoint before it is killed

_stop = threading.Event()  # this driver was asked to stop
_claimed: list[str] = []  # the run that this driver claimed
_handles: dict[str, Any] = {}  # run id -> actor handle, in every process that checks


class _Run:
    """The actor: who claimed the run, and whether it was asked to stop."""

    def __init__(self, claimant: str) -> None:
        self._claimant = claimant
        self._stop = False

    def claimant(self) -> str:
        return self._claimant

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> bool:
        return self._stop


def claim_run(run_id: str, wait_s: float = 15.0) -> Any:
    """Claim the run for this driver and handle its signals. Ray must be initialised. Returns the actor's handle.

    The actor of a driver that has just died lives for a second or two longer, so a name in use is tried again for `wait_s`
    seconds. Raises Refused when another driver has the run.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    deadline = time.monotonic() + wait_s
    # on the driver's node: on another one it would end with that node, and with it the claim and the way to stop the run
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 4, "scheduling_strategy": here}
    while True:
        try:
            handle = ray.remote(_Run).options(name=f"voco-run-{run_id}", **options).remote(_claimant())
            ray.get(handle.stopping.remote())
            break
        except (ValueError, ray.exceptions.ActorDiedError) as error:
            if time.monotonic() > deadline:
                raise Refused(f"{run_id} is running already, as {_other_claimant(run_id)}") from error
            time.sleep(0.5)
    _claimed[:] = [run_id]
    _handles[run_id] = handle
    listen_for_stop()
    threading.Thread(target=_forward_stop, args=(handle,), daemon=True).start()
    return handle


def adopt_run(run_id: str | None) -> None:
    """In another process of a run (a Tune trial): use the driver's claim and its stop flag."""
    if run_id is None:
        return
    _claimed[:] = [run_id]

    def watch() -> None:
        while not stop_requested(run_id):
            time.sleep(2)
        _stop.set()

    threading.Thread(target=watch, daemon=True).start()


def listen_for_stop() -> None:
    """Let SIGTERM and SIGINT ask this driver to stop; a second signal ends it at once. Call it in the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _stop.is_set():
        raise KeyboardInterrupt
    # os.write: print is not safe in a signal handler.
    os.write(1, b"asked to stop: ending at the next safe point\n")
    _stop.set()


def _forward_stop(handle: Any) -> None:
    """Forward the flag to the actor, from a thread: a signal handler must not call Ray."""
    _stop.wait()
    handle.stop.remote()


def is_stopping() -> bool:
    """True when this driver was asked to stop. Needs no Ray; stages check it between units of work."""
    return _stop.is_set()


def current_run() -> str | None:
    """The run that this driver claimed, which its training workers pass to `stop_requested`."""
    return _claimed[0] if _claimed else None


def stop_requested(run_id: str | None) -> bool:
    """In any process of the cluster: was this run asked to stop? Takes about a millisecond; False for an unclaimed run."""
    if run_id is None:
        return False
    import ray

    try:
        if run_id not in _handles:
            _handles[run_id] = ray.get_actor(f"voco-run-{run_id}", namespace=NAMESPACE)
        return bool(ray.get(_handles[run_id].stopping.remote()))
    except (ValueError, ray.exceptions.RayActorError):
        _handles.pop(run_id, None)
        return False


def _claimant() -> str:
    """The job's submission id, else the process."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    job = config.get("metadata", {}).get("job_submission_id")
    return f"job {job}" if job else f"process {os.getpid()} on {socket.gethostname()}"


def _other_claimant(run_id: str) -> str:
    import ray

    try:
        handle = ray.get_actor(f"voco-run-{run_id}", namespace=NAMESPACE)
        return str(ray.get(handle.claimant.remote(), timeout=5))
    except (ValueError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return "another job"
