"""Reads samples/, frame_cache/ and an image checkpoint; writes a checkpoint directory that keeps its frozen compressor."""

from __future__ import annotations

import time

from voco.job.spec import Job
from voco.model import weights
from voco.run.manifest import Manifest
from voco.store import storage
from voco.train import launch


def run(job: Job, run_id: str) -> Manifest:
    """Temporal fine-tuning on caches: pass 2 alone is trained, the maker of the caches stays as it is and goes along."""
    started = time.time()
    output = storage.resolve(job.output)
    returned = launch.fit(job, run_id, output)
    weights.keep_compressor(storage.resolve(job.inputs.checkpoint or ""), output)
    return launch.finish_training(job, run_id, started, returned)
