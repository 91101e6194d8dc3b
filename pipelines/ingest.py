"""Reads annotations and media, writes `samples/`, `rejects/` and the manifest."""

from __future__ import annotations

import time

from voco import manifest, storage, work
from voco.errors import JobFailed
from voco.ingest.account import balance, check_limits
from voco.ingest.archive import check_media
from voco.ingest.grouping import list_samples
from voco.ingest.media import Limits
from voco.ingest.places import open_places
from voco.ingest.samples import WriteSamples
from voco.manifest import Manifest
from voco.spec import Job


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
    places = open_places(block, annotations, media)
    answers = storage.resolve(job.inputs.answers) if job.inputs.answers is not None else None
    listing = list_samples(block, annotations, output, answers)
    print(f"{job.name}: listed {listing.read:,} rows, {listing.samples:,} samples in {listing.units:,} units", flush=True)
    limits = Limits(block.check, block.max_media_bytes, block.max_pixels, block.max_aspect, block.inline_max_bytes)
    arguments = {"output": output, "media": media, "limits": limits, "shard_bytes": block.shard_bytes, "places": places}
    in_process = listing.samples <= block.in_process_rows
    records = work.run(output, listing.units, WriteSamples, arguments, job.resources, in_process, job.name)
    account = balance(listing, records)
    print(f"{job.name}: {account}", flush=True)
    check_limits(block, account, output)
    if manifest.job_run_id(job) != run_id:
        raise JobFailed(f"{job.name}: its source changed while it was read; send it again, with --replace")
    return manifest.finish(job, run_id, started, counts=account.counts, tables=account.tables, statistics=account.statistics)
