"""Reads outputs of any kind; writes `report.html`, `summary/`, `summary.json` and the manifest, and prints the comparison."""

from __future__ import annotations

import time

from voco.job.config import Report
from voco.job.spec import Job
from voco.report.summary import write_report_job
from voco.run import manifest
from voco.run.logs import get_logger
from voco.run.manifest import Manifest
from voco.store import storage

log = get_logger("voco.report")


def run(job: Job, run_id: str) -> Manifest:
    """One report job. Raises Refused when none of its inputs is a finished output."""
    started = time.time()
    block: Report = job.block
    fields, lines = write_report_job(job.inputs.outputs, job.output_uri, block.title)
    for line in lines:
        log.info("%s", line)
    log.info("%s: %s", job.name, storage.join(job.output_uri, "report.html"))
    return manifest.write_manifest(job, run_id, started, **fields, statistics={"report": "report.html"})
