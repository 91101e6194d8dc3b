"""Reads samples/ tables; writes features/, one row for each unique image."""

from __future__ import annotations

import time

from voco.errors import JobFailed
from voco.job.spec import Job
from voco.precompute import features
from voco.run import manifest, units
from voco.run.manifest import Manifest
from voco.store import storage


def run(job: Job, run_id: str) -> Manifest:
    """Features of every unique image of `inputs.samples`, in work units on Ray Data."""
    started = time.time()
    block = job.features
    assert block is not None
    output = storage.resolve(job.output)
    count = features.list_images(output, [storage.resolve(item.uri) for item in job.inputs.samples], block.unit_images)
    threads = max(1, int(job.resources.cpus_per_worker))
    tower = block.tower.model_dump(exclude_none=True)
    arguments = {"output": output, "tower": tower, "batch": block.batch, "threads": threads}
    done = units.run_units(output, count, features.FeatureWorker, arguments, job.resources, in_process=False, label=job.name)
    bad = [one for record in done for one in record["bad"]]
    if bad:
        raise JobFailed(f"{job.name}: {len(bad)} images cannot be decoded; ingest with `validate: full` rejects them: {bad[0]}")
    written = sum(record["counts"]["written"] for record in done)
    return manifest.write_manifest(
        job,
        run_id,
        started,
        counts={"read": written, "written": written, "rejected": {}},
        tables={"features": [entry for record in done for entry in record["tables"]["features"]]},
    )
