"""Reads annotations and media; writes `samples/`, `rejects/`, `index.parquet` and the manifest."""

from __future__ import annotations

import time

from voco.errors import JobFailed
from voco.ingest.accounting import add_up, check_limits
from voco.ingest.listing import list_samples
from voco.ingest.media_sources import media_limits, open_media_sources
from voco.ingest.write_samples import WriteSamples, with_index
from voco.job.config import Ingest
from voco.job.spec import Job
from voco.run import manifest, units
from voco.run.logs import get_logger
from voco.run.manifest import Manifest

log = get_logger("voco.ingest")


def run(job: Job, run_id: str) -> Manifest:
    """One ingest job. Raises JobFailed when more rows are rejected than the job allows."""
    started = time.time()
    block: Ingest = job.block
    output, inputs = job.output_uri, job.resolved_inputs
    located = open_media_sources(block, inputs.annotations or "", inputs.media)
    listing = list_samples(block, inputs.annotations or "", output, inputs.answers)
    log.info(f"{job.name}: listed {listing.read:,} rows, {listing.samples:,} samples in {listing.units:,} units")
    for note, count in listing.notes.items():
        log.info(f"{job.name}: {count:,} {note}")
    arguments = {"output": output, "media": inputs.media, "shard_bytes": block.shard_bytes, "located": located}
    arguments["limits"] = media_limits(block)
    in_process = listing.samples <= block.in_process_rows
    records = units.run_units(output, listing.units, WriteSamples, arguments, job.resources, in_process, job.name)
    totals = add_up(listing, records)
    log.info(f"{job.name}: {totals}")
    check_limits(block, totals, output)
    if manifest.job_run_id(job) != run_id:
        raise JobFailed(f"{job.name}: its source changed while it was read; submit it again, with --replace")
    return manifest.write_manifest(job, run_id, started, **with_index(totals.fields, output, listing.units))
