"""Reads samples/, features/ if it is given, and a checkpoint; writes frame_cache/, one row per frame, and index.parquet."""

from __future__ import annotations

import time

from voco.job.config import FrameCache
from voco.job.spec import Job
from voco.precompute import frame_cache
from voco.run import manifest, units
from voco.run.logs import get_logger
from voco.run.manifest import Manifest

log = get_logger("voco.frame_cache")


def run(job: Job, run_id: str) -> Manifest:
    """Every frame compressed once, alone, by the checkpoint's compressor, in work units on Ray Data."""
    started = time.time()
    block: FrameCache = job.block
    output, checkpoint, features = job.output_uri, job.resolved_inputs.checkpoint or "", job.resolved_inputs.features
    frame_cache.check_method(checkpoint)
    frame_cache.check_stored_features(features, checkpoint)
    count = frame_cache.list_media_samples(output, job.resolved_inputs.sample_uris, block.unit_samples)
    threads = max(1, int(job.resources.cpus_per_worker))
    arguments = {"output": output, "checkpoint": checkpoint, "block": block.model_dump(), "threads": threads}
    arguments["features"] = features
    records = units.run_units(output, count, frame_cache.FrameWorker, arguments, job.resources, in_process=False, label=job.name)
    frame_cache.check_rejects(output, records, block.max_reject_share)
    index = frame_cache.write_index(output, records)
    fields = frame_cache.manifest_fields(index, records)
    frames, size = fields["counts"]["written"], fields["statistics"]["bytes_per_frame"]
    log.info("%s: %s frames in %s row groups, %s bytes a frame", job.name, f"{frames:,}", f"{index['rows']:,}", f"{size:,}")
    return manifest.write_manifest(job, run_id, started, **fields)
