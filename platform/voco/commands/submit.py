"""`voco submit`: submit a job to a cluster's Jobs API and follow its log.

Ray refuses a submission id that was used before, so ids are `<run id>-<attempt>`. The run id is also in the job's metadata,
so that a job submitted by hand with `ray job submit` is found as well.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from voco.commands.cluster import ClusterTarget, connect, is_on_this_machine
from voco.commands.follow import RUNNING, Write, follow, jobs_of_run, write_stdout
from voco.commands.upload_size import check_upload_size
from voco.errors import Refused, message_line
from voco.job.spec import Job
from voco.run import manifest
from voco.run.claim import STOP_WAIT_S
from voco.store import storage


def submit(file: str, job: Job, target: ClusterTarget, replace: bool = False, write: Write = write_stdout) -> int:
    """Submit a job and follow it; returns its exit code. A run that is running is followed; a finished run is reported.

    `write` takes the pieces of the job's log.
    """
    if storage.is_placeholder(job.output):
        raise Refused(f"{file}: output: {job.output} is a placeholder; put your own location there")
    run_id = manifest.job_run_id(job)
    if output_is_finished(job, run_id, replace):
        print(f"{job.name}: done already ({run_id}): {job.output}")
        return 0
    client = connect(target)
    running = [ray_job for ray_job in jobs_of_run(client, run_id) if ray_job.status in RUNNING]
    if running:
        print(f"{run_id} is running as {running[0].submission_id}; following it", flush=True)
        return follow(client, str(running[0].submission_id), write)
    if output_is_finished(job, run_id, replace):  # by a job that ended during this check
        print(f"{job.name}: done already ({run_id}): {job.output}")
        return 0
    entrypoint, runtime_env = package_job(file, job, client, target, replace)
    stages = len(job.stages)
    print(f"{job.name}: {job.kind}, {stages} stage{'s' * (stages > 1)}, run {run_id}, output {job.output}")
    print(f"The same by hand:\n  {ray_submit_line(target, entrypoint, runtime_env, run_id)}", flush=True)
    submission_id = f"{run_id}-{1 + max([0, *map(_attempt_number, jobs_of_run(client, run_id))])}"
    try:
        client.submit_job(
            entrypoint=entrypoint, runtime_env=runtime_env, metadata={"run_id": run_id}, submission_id=submission_id
        )
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise Refused(f"{target.address}: the job was not accepted: {message_line(error, 300)}") from error
        print(f"{run_id} was submitted a moment ago as {submission_id}; following it", flush=True)
    return follow(client, submission_id, write)


def output_is_finished(job: Job, run_id: str, replace: bool = False) -> bool:
    """True when the output is this run's and complete. Raises Refused when it is another run's and `replace` is off."""
    output = job.output_uri
    owner = manifest.output_run_id(output)
    if owner not in (None, run_id) and not replace:
        raise Refused(f"output: {job.output} holds run {owner}, this job is {run_id}; use another output, or --replace")
    finished = manifest.read_manifest(output) if owner == run_id else None
    changed = manifest.changed_parent(finished) if finished is not None else None
    if changed is not None and not replace:
        raise Refused(changed)
    return finished is not None and changed is None


def package_job(file: str, job: Job, client: Any, target: ClusterTarget, replace: bool) -> tuple[str, dict[str, Any]]:
    """Entrypoint and runtime environment. On this machine the working directory is used in place, else it is uploaded."""
    directory = os.getcwd()
    path = os.path.relpath(file)
    environment = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    environment["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::DeprecationWarning"  # of libraries, in every worker
    if Path("platform/voco/__init__.py").exists():
        environment["PYTHONPATH"] = "platform:."
    entrypoint = shlex.join(["python", "-m", "pipelines", "run", path, *(["--replace"] if replace else [])])
    if is_on_this_machine(client, target):
        return entrypoint, {"working_dir": f"local://{directory}", "env_vars": environment}
    if path.startswith(".."):
        raise Refused(
            f"{file}: is outside {directory}, the folder that is uploaded to the cluster; run this from a folder above the file"
        )
    for part in (job, *(stage for stage in job.stages if stage is not job)):
        _check_portable(file, part)
    check_upload_size(directory)
    return entrypoint, {"working_dir": ".", "env_vars": environment}


def _check_portable(file: str, job: Job) -> None:
    """Refuse relative paths, which have no meaning on other machines."""
    for key, uri in {"output": job.output, **job.uris()}.items():
        if "://" not in uri and not uri.startswith(("/", "@")):
            raise Refused(f"{file}: {key}: expected s3:// or an absolute path, for a cluster on other machines, got {uri}")


def ray_submit_line(target: ClusterTarget, entrypoint: str, runtime_env: dict[str, Any], run_id: str) -> str:
    """The `ray job submit` line that does the same in any shell. It names no submission id: an id can be used only once."""
    words = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", target.address]
    words += ["--metadata-json", json.dumps({"run_id": run_id})]
    words += ["--runtime-env-json", json.dumps(runtime_env), "--", *shlex.split(entrypoint)]
    return " ".join([*map(shlex.quote, target.environment()), shlex.join(words)])


def _attempt_number(ray_job: Any) -> int:
    number = str(ray_job.submission_id).rsplit("-", 1)[-1]
    return int(number) if number.isdigit() else 0
