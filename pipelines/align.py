"""Reads samples/ of captions, features/ and a language model (or a new one); writes a checkpoint with a trained projector."""

from __future__ import annotations

import time

from voco.job.spec import Job
from voco.run.manifest import Manifest
from voco.store import storage
from voco.train import launch


def run(job: Job, run_id: str) -> Manifest:
    """The projector alone learns to speak to the frozen language model (LLaVA's first stage), without <voco> tokens."""
    started = time.time()
    returned = launch.fit(job, run_id, storage.resolve(job.output))
    return launch.finish_training(job, run_id, started, returned)
