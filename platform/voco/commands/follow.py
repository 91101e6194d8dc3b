"""`voco status`, `voco logs` and `voco stop`: find a submitted run by run id, submission id or job file."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

from voco.errors import Refused, message_line
from voco.job.load import load_job
from voco.run import manifest
from voco.run.claim import STOP_WAIT_S
from voco.run.logs import QuietStream

RUNNING = ("PENDING", "RUNNING")
Write = Callable[[str], Any]  # takes pieces of a log, of any size


def write_stdout(text: str) -> None:
    print(text, end="", flush=True)


def jobs_of_run(client: Any, run_id: str) -> list[Any]:
    """The cluster's jobs of a run: the running ones first, then the newest."""
    jobs = [ray_job for ray_job in client.list_jobs() if (ray_job.metadata or {}).get("run_id") == run_id]
    return sorted(jobs, key=lambda ray_job: (ray_job.status in RUNNING, ray_job.start_time or 0), reverse=True)


def find_job(client: Any, run: str) -> Any:
    """The job of a run id, a submission id or a job file."""
    name = manifest.job_run_id(load_job(run)) if run.endswith((".yaml", ".yml")) else run
    jobs = jobs_of_run(client, name) or [ray_job for ray_job in client.list_jobs() if ray_job.submission_id == name]
    if not jobs:
        raise Refused(f"{run}: the cluster knows no job of {name}")
    return jobs[0]


def follow(client: Any, submission_id: str, write: Write = write_stdout) -> int:
    """Print the job's log until it ends, on a terminal with bars; returns its exit code. Ctrl-C ends the printing; the job
    continues.
    """
    on_terminal = write is write_stdout and sys.stdout.isatty()
    try:
        asyncio.run(_print_log(client, submission_id, QuietStream(sys.stdout).write if on_terminal else write))
    except KeyboardInterrupt:
        if write is not write_stdout:  # the caller owns the terminal, and knows what becomes of the job
            raise
        print(f"\nThe job continues. `voco logs {submission_id}` follows it, `voco stop {submission_id}` ends it")
        return 130
    return job_exit_code(client.get_job_info(submission_id))


async def _print_log(client: Any, submission_id: str, write: Write) -> None:
    """Write every line of the log once, however often the connection breaks."""
    printed = 0
    while True:
        received = 0
        try:
            async for text in client.tail_job_logs(submission_id):
                fresh = text[max(0, printed - received) :]
                received += len(text)
                if received > printed:
                    write(fresh)
                    printed = received
        except (RuntimeError, OSError) as error:
            print(f"(log connection: {message_line(error, 120)})", file=sys.stderr)
        if client.get_job_info(submission_id).status not in RUNNING:
            return
        await asyncio.sleep(1)


def job_exit_code(info: Any) -> int:
    """0 done, 2 refused, 130 stopped, 1 failed; a failure is printed on stderr, since the log may not have it."""
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED" or info.driver_exit_code == 130:
        return 130
    if info.driver_exit_code in (1, 2):
        return int(info.driver_exit_code)
    code = "" if info.driver_exit_code is None else f" (driver exit code {info.driver_exit_code})"
    print(f"{info.submission_id}: failed{code}; submitted again, it continues from what is finished", file=sys.stderr)
    return 1


def print_status(client: Any, run: str) -> int:
    info = find_job(client, run)
    seconds = ((info.end_time or time.time() * 1000) - info.start_time) / 1000 if info.start_time else 0.0
    run_id = (info.metadata or {}).get("run_id", "")
    print(f"{info.submission_id}: {info.status.value}, {seconds:.0f} s, run {run_id}, driver exit code {info.driver_exit_code}")
    return 0


def follow_logs(client: Any, run: str) -> int:
    return follow(client, str(find_job(client, run).submission_id))


def stop_run(client: Any, run: str) -> int:
    """Ask a job to end and wait for it: at the next safe point, with a checkpoint where there is one."""
    info = find_job(client, run)
    if info.status not in RUNNING:
        print(f"{info.submission_id}: not running: {info.status.value}")
        return 0
    client.stop_job(info.submission_id)
    print(f"{info.submission_id}: asked to stop", flush=True)
    deadline = time.monotonic() + STOP_WAIT_S + 30
    while (now := client.get_job_info(info.submission_id)).status in RUNNING:
        if time.monotonic() > deadline:
            print(f"{info.submission_id}: still {now.status.value}", file=sys.stderr)
            return 1
        time.sleep(0.5)
    print(f"{info.submission_id}: {now.status.value}; submitted again, it continues")
    return 0
