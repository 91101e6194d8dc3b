"""Jobs on a Ray cluster through its Jobs API: send, follow, ask, stop.

Ray runs a job once and refuses a submission id that was used before, so ids are `<run id>-<attempt>`; the run id stands
in the job's metadata too, by which a job sent by hand with `ray job submit` is found as well.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from voco.errors import Refused
from voco.job import spec
from voco.job.spec import Job
from voco.run import manifest
from voco.store import storage

STOP_WAIT_S = 120  # for a checkpoint; Ray kills the driver after it
RUNNING = ("PENDING", "RUNNING")
CLUSTER_FILE = Path(".demo/cluster.json")  # what voco.demo.cluster writes


@dataclass(frozen=True)
class ClusterTarget:
    """A cluster's Jobs API. `token_path` is None where the environment holds the token, or none is needed."""

    address: str
    token_path: str | None
    temp_dirs: tuple[str, ...]  # where that cluster's sessions may lie, if it runs on this machine

    def headers(self) -> dict[str, str]:
        token = os.environ.get("RAY_AUTH_TOKEN", "")
        if self.token_path is not None:
            token = Path(self.token_path).read_text().strip()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def environment(self) -> list[str]:
        """What a `ray` command in another shell needs; never the token itself."""
        if self.token_path is not None:
            return ["RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={os.path.abspath(self.token_path)}"]
        return ["RAY_AUTH_MODE=token"] if os.environ.get("RAY_AUTH_TOKEN") else []


def find_cluster(address: str | None = None) -> ClusterTarget:
    """The cluster to talk to: `address`, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else the demo's own."""
    own = json.loads(CLUSTER_FILE.read_text()) if CLUSTER_FILE.exists() else None
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if address is None and own is None:
        raise Refused("no cluster: give --address http://HOST:8265 or set RAY_API_SERVER_ADDRESS, or start one with `make demo`")
    if own is not None and (address is None or address.rstrip("/") == own["dashboard"]):
        asked = os.environ.get("RAY_AUTH_TOKEN_PATH")
        return ClusterTarget(own["dashboard"], asked or own["token_path"], (own["temp_dir"], "/tmp/ray"))
    assert address is not None
    if "://" not in address:
        address = f"http://{address}"
    return ClusterTarget(address.rstrip("/"), os.environ.get("RAY_AUTH_TOKEN_PATH"), ("/tmp/ray",))


def connect(where: ClusterTarget) -> Any:
    """A JobSubmissionClient. Raises Refused when the cluster does not answer, or does not take the token."""
    # Both variables beat the client's own argument, so the answer to "which cluster" must stand in them.
    os.environ["RAY_API_SERVER_ADDRESS"] = where.address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(where.address, headers=where.headers())
    except AuthenticationError as error:
        source = where.token_path or "RAY_AUTH_TOKEN"
        raise Refused(f"{where.address}: the cluster does not take the token of {source}; set RAY_AUTH_TOKEN_PATH") from error
    except FileNotFoundError as error:
        raise Refused(f"{where.token_path}: no such token file; set RAY_AUTH_TOKEN_PATH") from error
    except (ConnectionError, RuntimeError) as error:
        raise Refused(f"{where.address}: no Ray cluster answers there: {' '.join(str(error).split())[:200]}") from error


def submit(file: str, job: Job, where: ClusterTarget, replace: bool = False) -> int:
    """Send a job and follow it; the job's exit code. A run that is going on is followed, a finished one says so."""
    if storage.is_placeholder(job.output):
        raise Refused(f"{file}: output: {job.output} is a placeholder; put your own location there")
    run_id = manifest.job_run_id(job)
    if output_is_finished(job, run_id, replace):
        print(f"{job.name}: done already ({run_id}): {job.output}")
        return 0
    client = connect(where)
    going = [found for found in jobs_of_run(client, run_id) if found.status in RUNNING]
    if going:
        print(f"{run_id} is running as {going[0].submission_id}; following it", flush=True)
        return follow(client, str(going[0].submission_id))
    if output_is_finished(job, run_id, replace):  # by a job that ended while this one looked
        print(f"{job.name}: done already ({run_id}): {job.output}")
        return 0
    entrypoint, runtime_env = package_job(file, job, client, where, replace)
    stages = len(job.flow.stages) if job.flow is not None else 1
    print(f"{job.name}: {job.kind}, {stages} stage{'s' * (stages > 1)}, run {run_id}, output {job.output}")
    print(f"The same by hand:\n  {ray_submit_line(where, entrypoint, runtime_env, run_id)}", flush=True)
    submission_id = f"{run_id}-{1 + max([0, *map(_attempt, jobs_of_run(client, run_id))])}"
    try:
        client.submit_job(
            entrypoint=entrypoint, runtime_env=runtime_env, metadata={"run_id": run_id}, submission_id=submission_id
        )
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise Refused(f"{where.address}: the job was not taken: {' '.join(str(error).split())[:300]}") from error
        print(f"{run_id} was sent a moment ago as {submission_id}; following it", flush=True)
    return follow(client, submission_id)


def output_is_finished(job: Job, run_id: str, replace: bool = False) -> bool:
    """True when the output is this run's and whole; Refused when it is another run's, unless it is to be replaced."""
    output = storage.resolve(job.output)
    held = manifest.output_run_id(output)
    if held not in (None, run_id) and not replace:
        raise Refused(f"output: {job.output} holds run {held}, this job is {run_id}; use another output, or --replace")
    found = manifest.read_manifest(output) if held == run_id else None
    changed = manifest.changed_parent(found) if found is not None else None
    if changed is not None and not replace:
        raise Refused(changed)
    return found is not None and changed is None


def package_job(file: str, job: Job, client: Any, where: ClusterTarget, replace: bool) -> tuple[str, dict[str, Any]]:
    """Entrypoint and runtime environment. On this machine the working directory is used in place, else it is sent."""
    here = os.getcwd()
    path = os.path.relpath(file)
    environment = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    environment["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::DeprecationWarning"  # of libraries, once a worker and call
    if Path("platform/voco/__init__.py").exists():
        environment["PYTHONPATH"] = "platform:."
    entrypoint = shlex.join(["python", "-m", "pipelines", "run", path, *(["--replace"] if replace else [])])
    if _on_this_machine(client, where):
        return entrypoint, {"working_dir": f"local://{here}", "env_vars": environment}
    if path.startswith(".."):
        raise Refused(f"{file}: lies outside of {here}, which is what is sent to the cluster; start from a folder above it")
    every = job.flow.stages if job.flow is not None else []
    for key, uri in [(key, uri) for one in (job, *every) for key, uri in {"output": one.output, **one.uris()}.items()]:
        if "://" not in uri and not uri.startswith(("/", "@")):
            raise Refused(f"{file}: {key}: expected s3:// or an absolute path, for a cluster on other machines, got {uri}")
    return entrypoint, {"working_dir": ".", "env_vars": environment}


def _on_this_machine(client: Any, where: ClusterTarget) -> bool:
    """A loopback address may be a tunnel: the cluster is here only if its session directory is."""
    host = urlparse(where.address).hostname or ""
    if host != "localhost":
        try:
            if not ipaddress.ip_address(host).is_loopback:
                return False
        except ValueError:
            return False
    session = str(client._do_request("GET", "/api/version").json().get("session_name", ""))
    return bool(session) and any((Path(folder) / session).is_dir() for folder in where.temp_dirs)


def ray_submit_line(where: ClusterTarget, entrypoint: str, runtime_env: dict[str, Any], run_id: str) -> str:
    """The `ray job submit` line that does the same in any shell. It names no submission id: those are used up."""
    words = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", where.address]
    words += ["--metadata-json", json.dumps({"run_id": run_id})]
    words += ["--runtime-env-json", json.dumps(runtime_env), "--", *shlex.split(entrypoint)]
    return " ".join([*map(shlex.quote, where.environment()), shlex.join(words)])


def _attempt(found: Any) -> int:
    number = str(found.submission_id).rsplit("-", 1)[-1]
    return int(number) if number.isdigit() else 0


def jobs_of_run(client: Any, run_id: str) -> list[Any]:
    """The cluster's jobs of a run: what runs, then the rest, newest first."""
    jobs = [found for found in client.list_jobs() if (found.metadata or {}).get("run_id") == run_id]
    return sorted(jobs, key=lambda found: (found.status in RUNNING, found.start_time or 0), reverse=True)


def find_job(client: Any, run: str) -> Any:
    """The job of a run id, a submission id or a job file."""
    name = manifest.job_run_id(spec.load_job(run)) if run.endswith((".yaml", ".yml")) else run
    found = jobs_of_run(client, name) or [item for item in client.list_jobs() if item.submission_id == name]
    if not found:
        raise Refused(f"{run}: the cluster knows no job of {name}")
    return found[0]


def follow(client: Any, submission_id: str) -> int:
    """Print the job's log until it ends; its exit code. Ctrl-C leaves, the job goes on."""
    try:
        asyncio.run(_print_log(client, submission_id))
    except KeyboardInterrupt:
        print(f"\nleft; the job goes on. `voco logs {submission_id}` follows it, `voco stop {submission_id}` ends it")
        return 130
    return job_exit_code(client.get_job_info(submission_id))


async def _print_log(client: Any, submission_id: str) -> None:
    """The whole log, once, however often the connection breaks."""
    printed = 0
    while True:
        passed = 0
        try:
            async for text in client.tail_job_logs(submission_id):
                fresh = text[max(0, printed - passed) :]
                passed += len(text)
                if passed > printed:
                    print(fresh, end="", flush=True)
                    printed = passed
        except (RuntimeError, OSError) as error:
            print(f"(log connection: {' '.join(str(error).split())[:120]})", file=sys.stderr)
        if client.get_job_info(submission_id).status not in RUNNING:
            return
        await asyncio.sleep(1)


def job_exit_code(info: Any) -> int:
    """0 done, 2 refused, 130 stopped, 1 failed; a failure is told on stderr, since the log may not say it."""
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED" or info.driver_exit_code == 130:
        return 130
    if info.driver_exit_code in (1, 2):
        return int(info.driver_exit_code)
    code = "" if info.driver_exit_code is None else f" (driver exit code {info.driver_exit_code})"
    print(f"{info.submission_id}: failed{code}; sent again, it continues from what is finished", file=sys.stderr)
    return 1


def status(client: Any, run: str) -> int:
    info = find_job(client, run)
    seconds = ((info.end_time or time.time() * 1000) - info.start_time) / 1000 if info.start_time else 0.0
    run_id = (info.metadata or {}).get("run_id", "")
    print(f"{info.submission_id}: {info.status.value}, {seconds:.0f} s, run {run_id}, driver exit code {info.driver_exit_code}")
    return 0


def logs(client: Any, run: str) -> int:
    return follow(client, str(find_job(client, run).submission_id))


def stop(client: Any, run: str) -> int:
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
    print(f"{info.submission_id}: {now.status.value}; sent again, it continues")
    return 0
