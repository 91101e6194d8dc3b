"""One job of any kind: claim its output, run its stage, record it in W&B."""

from __future__ import annotations

import os
from collections.abc import Callable

from voco.job.spec import Job
from voco.job.trials import inner_jobs
from voco.run import manifest, wandb_tracking
from voco.run.logs import get_logger
from voco.run.manifest import Manifest
from voco.run.prometheus import stage_metrics
from voco.run.wandb_tracking import TrackedRun

log = get_logger(__name__)

RunStage = Callable[[Job, str], Manifest]  # reads the inputs, does the work, writes the manifest last
RecordStage = Callable[[TrackedRun, Job], None]  # a kind's own figures in W&B, besides its output

RECORD_S = 600  # seconds that recording a finished job may take


def run_stage(job: Job, run: RunStage, record: RecordStage | None = None, replace: bool = False) -> Manifest:
    """Run one job in this driver, or report that it is done. `replace` overwrites an output of another run."""
    run_id = manifest.job_run_id(job)
    finished = manifest.claim_output(job, run_id, replace)
    if finished is not None:
        log.info("%s: done already (%s)", job.name, run_id)
        return finished
    log.info("%s: %s as %s", job.name, job.kind, run_id)
    with stage_metrics(job.name, run_id, job.kind):
        done = run(job, run_id)
    tracked = wandb_tracking.tracked_job(job, run_id)
    if tracked is not None and (job.stage.own_wandb_run or wandb_tracking.GROUP not in os.environ):
        with wandb_tracking.start_tracking(tracked) as tracked_run, tracked_run.guard(RECORD_S):
            _record(tracked_run, job, done, record)
    return done


def _record(run: TrackedRun, job: Job, done: Manifest, record: RecordStage | None) -> None:
    """The output as an artifact; a flow's and a sweep's run also get the outputs of their stages and trials."""
    for inner in inner_jobs(job):
        output = inner.output_uri
        finished = manifest.read_manifest(output)
        if finished is not None:
            run.log_output(finished, output)
    if record is not None:
        record(run, job)
    run.log_output(done, job.output_uri)
