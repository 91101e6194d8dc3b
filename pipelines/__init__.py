"""The stages, one driver-side module each, and the one way to run a job of any kind.

Every module has `run(job, run_id) -> Manifest`: read the inputs, do the work, write the manifest last.
"""

from __future__ import annotations

import importlib
import os

from voco.job.spec import Job
from voco.run import manifest, wandb_tracking
from voco.run.manifest import Manifest

RECORDED = ("evaluate", "sweep", "flow")  # kinds with a W&B run of their own; a flow's run names the outputs of its other stages


def run(job: Job, replace: bool = False) -> Manifest:
    """Run one job in this driver, or say that it is done. `replace` overwrites an output that holds another run."""
    run_id = manifest.job_run_id(job)
    finished = manifest.claim_output(job, run_id, replace)
    if finished is not None:
        print(f"{job.name}: done already ({run_id})", flush=True)
        return finished
    print(f"{job.name}: {job.kind} as {run_id}", flush=True)
    from voco.report.wandb_outputs import record_output

    stage = importlib.import_module(f"pipelines.{job.kind}")
    done: Manifest = stage.run(job, run_id)
    tracked = wandb_tracking.tracked_job(job, run_id)
    if tracked is not None and (job.kind in RECORDED or wandb_tracking.GROUP not in os.environ):
        with wandb_tracking.start_tracking(tracked) as run_of_it, run_of_it.guard(600):
            record_output(run_of_it, job, done)
    return done
