"""The stages, one driver-side module each, and the one way to run a job of any kind.

Every module has `run(job, run_id) -> Manifest`: read the inputs, do the work, write the manifest last.
"""

from __future__ import annotations

import importlib
import os

from voco import manifest, tracking
from voco.manifest import Manifest
from voco.spec import Job

RECORDED = ("evaluate", "sweep", "flow")  # kinds with a W&B run of their own; a flow's run names the outputs of its other stages


def run(job: Job, replace: bool = False) -> Manifest:
    """Run one job in this driver, or say that it is done. `replace` overwrites an output that holds another run."""
    run_id = manifest.job_run_id(job)
    finished = manifest.begin(job, run_id, replace)
    if finished is not None:
        print(f"{job.name}: done already ({run_id})", flush=True)
        return finished
    print(f"{job.name}: {job.kind} as {run_id}", flush=True)
    from pipelines.record import record

    stage = importlib.import_module(f"pipelines.{job.kind}")
    done: Manifest = stage.run(job, run_id)
    tracked = tracking.tracked(job, run_id)
    if tracked is not None and (job.kind in RECORDED or tracking.GROUP not in os.environ):
        with tracking.start(tracked) as run_of_it, run_of_it.guard(600):
            record(run_of_it, job, done)
    return done
