"""Runs a recipe as a user would: its data, a local Ray cluster that ends with this process, a job that is sent and followed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from voco.commands import submit
from voco.commands.cluster import RAY_SESSIONS, ClusterTarget
from voco.demo import cluster, guard
from voco.demo.recipe import Recipe
from voco.errors import Stopped
from voco.job.spec import Job
from voco.run import manifest
from voco.run.proxies import LOOPBACK, bypass_proxy


def run_flow(job: Job, file: str, recipe: Recipe, spent: dict[str, float]) -> int:
    """Write the recipe's data, run the job file on a cluster that ends with this process, and follow it.

    Seconds of each part are added to `spent`. Returns the job's exit code.
    """
    bypass_proxy(*LOOPBACK)  # its cluster is on this machine
    if manifest.read_manifest(job.output_uri) is not None:
        write_demo_data(recipe)  # the run id depends on it
        if submit.output_is_finished(job, manifest.job_run_id(job)):
            print(f"Done already: {job.output}")
            return 0
    guard.stop_with_this_process(recipe.folder)
    with peak_memory() as peak:
        with ThreadPoolExecutor(1) as thread:  # Ray starts while the data are written
            starting = thread.submit(timed, spent, "Ray start", lambda: cluster.start(recipe.folder))
            timed(spent, "data", lambda: write_demo_data(recipe))
        started = starting.result()
        target = ClusterTarget(started.dashboard, started.token_path, (started.temp_dir, RAY_SESSIONS))
        log = recipe.folder / "demo.log"
        print(f"The complete log: {log}", flush=True)
        code: int = timed(spent, "flow", lambda: follow_flow(file, job, target, log))
        timed(spent, "Ray stop", lambda: cluster.stop(recipe.folder))
    print(f"\nPeak memory: {peak[0] / 2**30:.1f} GiB above the machine's use before Ray started")
    return code


def follow_flow(file: str, job: Job, target: ClusterTarget, log: Path) -> int:
    """Submit the flow; its log goes to a file, and to the terminal as bars or, where there is no terminal, as plain lines.

    Raises Stopped on Ctrl-C.
    """
    try:
        with open(log, "a") as file_log:
            if not sys.stdout.isatty():
                return submit.submit(file, job, target, write=_tee(file_log, sys.stdout.write))
            from voco.commands.flow_view import FlowView

            with FlowView(job) as view:
                return submit.submit(file, job, target, write=_tee(file_log, view.feed))
    except KeyboardInterrupt:
        raise Stopped("the demo's cluster ends now; run again, it continues where it was") from None


def _tee(file_log: IO[str], show: Callable[[str], Any]) -> Callable[[str], None]:
    def write(text: str) -> None:
        file_log.write(text)
        file_log.flush()
        show(text)
        sys.stdout.flush()

    return write


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yields [bytes]: the machine's peak memory use inside the block above that at its start, sampled every second."""
    before, peak, ended = psutil.virtual_memory().used, [0], threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            peak[0] = max(peak[0], psutil.virtual_memory().used - before)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield peak
    finally:
        ended.set()


def write_demo_data(recipe: Recipe) -> None:
    """Write the recipe's datasets in the file formats of real ones; data that exists is not written again."""
    from voco.demo import write

    write.write_data(recipe.data, recipe)


def timed(spent: dict[str, float], part: str, call: Callable[[], Any]) -> Any:
    """What `call` returns. Its seconds are added to `spent` under the name `part`."""
    started = time.monotonic()
    try:
        return call()
    finally:
        spent[part] = time.monotonic() - started
