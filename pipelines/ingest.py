"""Reads annotations and media, writes `samples/`, `rejects/` and the manifest."""

from __future__ import annotations

import time

from voco.errors import JobFailed
from voco.ingest.accounting import add_up, check_limits
from voco.ingest.listing import list_samples
from voco.ingest.media.archive import check_media
from voco.ingest.media.image import MediaLimits
from voco.ingest.media_sources import open_media_sources
from voco.ingest.write_samples import WriteSamples
from voco.job.spec import Job
from voco.run import manifest, units
from voco.run.manifest import Manifest
from voco.store import storage


def run(job: Job, run_id: str) -> Manifest:
    """One ingest job. Raises JobFailed when more rows are lost than the job allows."""
    started = time.time()
    block = job.ingest
    assert block is not None
    assert job.inputs.annotations is not None
    output = storage.resolve(job.output)
    media = storage.resolve(job.inputs.media) if job.inputs.media is not None else None
    check_media(media)
    annotations = storage.resolve(job.inputs.annotations)
    places = open_media_sources(block, annotations, media)
    answers = storage.resolve(job.inputs.answers) if job.inputs.answers is not None else None
    listing = list_samples(block, annotations, output, answers)
    print(f"{job.name}: listed {listing.read:,} rows, {listing.samples:,} samples in {listing.units:,} units", flush=True)
    limits = MediaLimits(block.check, block.max_media_bytes, block.max_pixels, block.max_aspect, block.inline_max_bytes)
    arguments = {"output": output, "media": media, "limits": limits, "shard_bytes": block.shard_bytes, "places": places}
    in_process = listing.samples <= block.in_process_rows
    records = units.run_units(output, listing.units, WriteSamples, arguments, job.resources, in_process, job.name)
    account = add_up(listing, records)
    print(f"{job.name}: {account}", flush=True)
    check_limits(block, account, output)
    if manifest.job_run_id(job) != run_id:
        raise JobFailed(f"{job.name}: its source changed while it was read; send it again, with --replace")
    return manifest.write_manifest(
        job, run_id, started, counts=account.counts, tables=account.tables, statistics=account.statistics
    )
