"""Reads samples/ tables; writes features/, one row for each unique image, and index.parquet."""

from __future__ import annotations

import time

from voco.job.config import Features
from voco.job.spec import Job
from voco.precompute import features
from voco.run import manifest, units
from voco.run.manifest import Manifest
from voco.store import schemas
from voco.store.index import join_pieces


def run(job: Job, run_id: str) -> Manifest:
    """Features of every unique image of `inputs.samples`, in work units on Ray Data."""
    started = time.time()
    block: Features = job.block
    output = job.output_uri
    count = features.list_images(output, job.resolved_inputs.sample_uris, block.unit_images)
    threads = max(1, int(job.resources.cpus_per_worker))
    tower = block.tower.model_dump(exclude_none=True)
    arguments = {"output": output, "tower": tower, "batch": block.batch, "threads": threads}
    records = units.run_units(output, count, features.FeatureWorker, arguments, job.resources, in_process=False, label=job.name)
    features.check_decoded(job.name, records)
    written = sum(record["counts"]["written"] for record in records)
    counts = {"read": written, "written": written, "rejected": {}}
    index = join_pieces(output, count, schemas.FEATURES_INDEX)
    tables = {"features": [entry for record in records for entry in record["tables"]["features"]], "index": [index]}
    return manifest.write_manifest(job, run_id, started, counts=counts, tables=tables)
