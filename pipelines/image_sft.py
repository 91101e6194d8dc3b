"""Reads samples/, features/ and a checkpoint (or a new model); writes a checkpoint directory."""

from __future__ import annotations

import time

from voco.job.spec import Job
from voco.run.manifest import Manifest
from voco.store import storage
from voco.train import launch


def run(job: Job, run_id: str) -> Manifest:
    """Supervised fine-tuning under the job's compression method, on Ray Train workers with DeepSpeed."""
    started = time.time()
    returned = launch.fit(job, run_id, storage.resolve(job.output))
    return launch.finish_training(job, run_id, started, returned)
