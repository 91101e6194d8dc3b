"""Reads samples/; writes `count.json` and the manifest."""

from __future__ import annotations

import time

from fruit.row_count import RowCount
from voco.errors import JobFailed
from voco.job.spec import Job
from voco.run import manifest
from voco.run.manifest import Manifest
from voco.store import storage
from voco.store.samples import row_addresses


def run(job: Job, run_id: str) -> Manifest:
    started, block = time.time(), job.block
    assert isinstance(block, RowCount)
    count = sum(1 for _ in row_addresses(job.resolved_inputs.sample_uris))
    if count < block.at_least:
        raise JobFailed(f"{job.name}: {count} rows, expected at least {block.at_least}")
    storage.write_json(storage.join(job.output_uri, "count.json"), {"rows": count})
    return manifest.write_manifest(job, run_id, started, counts={"read": count, "written": 1})
