"""The stages in order, one driver-side module each: ingest, features, image_sft, evaluate, report; flow joins them.

Every module has `run(job, run_id) -> Manifest`: read the inputs, do the work, write the manifest last.
"""

from __future__ import annotations

import importlib

from voco import manifest
from voco.manifest import Manifest
from voco.spec import Job


def run(job: Job, replace: bool = False) -> Manifest:
    """Run one job in this driver, or say that it is done. `replace` overwrites an output that holds another run."""
    run_id = manifest.job_run_id(job)
    finished = manifest.begin(job, run_id, replace)
    if finished is not None:
        print(f"{job.name}: done already ({run_id})", flush=True)
        return finished
    print(f"{job.name}: {job.kind} as {run_id}", flush=True)
    stage = importlib.import_module(f"pipelines.{job.kind}")
    done: Manifest = stage.run(job, run_id)
    return done
