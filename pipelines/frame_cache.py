"""Reads samples/ and a checkpoint; writes frame_cache/, one row a frame, and index.parquet."""

from __future__ import annotations

import time

import pyarrow as pa

from voco.errors import JobFailed, Refused
from voco.job.spec import Job
from voco.model import weights
from voco.precompute import frame_cache
from voco.run import manifest, units
from voco.run.manifest import Manifest
from voco.store import parquet, schemas, storage


def run(job: Job, run_id: str) -> Manifest:
    """Every frame compressed once, alone, by the checkpoint's compressor, in work units on Ray Data."""
    started = time.time()
    block = job.frame_cache
    assert block is not None
    output, checkpoint = storage.resolve(job.output), storage.resolve(job.inputs.checkpoint or "")
    method = weights.read_config(checkpoint)["layout"]["method"]
    if method != "voco":
        raise Refused(f"inputs.checkpoint: frame caches need a checkpoint of method voco, got {method}")
    count = frame_cache.list_media_samples(output, [storage.resolve(item.uri) for item in job.inputs.samples], block.unit_samples)
    if count == 0:
        raise Refused("inputs.samples: no rows with images or videos")
    arguments = {"output": output, "checkpoint": checkpoint, "block": block.model_dump()}
    done = units.run_units(output, count, frame_cache.FrameWorker, arguments, job.resources, in_process=False, label=job.name)
    read, lost = (sum(record["counts"][key] for record in done) for key in ("read", "rejected"))
    if lost > block.max_reject_share * read:
        first = next(one for record in done for one in record["rejects"])
        for record in done:
            if record["rejects"]:
                storage.delete(units.unit_record_uri(output, record["unit"]))  # sent again, these units are done again
        raise JobFailed(
            f"frame_cache.max_reject_share: {lost} of {read} samples cannot be decoded, more than {block.max_reject_share:.2%}; "
            f"{output}/rejects says which and why, {first['source']} for one: {first['detail']}"
        )
    index = pa.Table.from_pylist([line for record in done for line in record["index"]], schema=schemas.FRAME_INDEX)
    entry = parquet.write_table(storage.join(output, "index.parquet"), [index], schemas.FRAME_INDEX)
    frames, each = sum(record["counts"]["written"] for record in done), done[0]["bytes_per_frame"]
    print(f"{job.name}: {frames:,} frames of {index.num_rows:,} row groups, {each:,} bytes a frame", flush=True)
    tables = {name: [one for record in done for one in record["tables"][name]] for name in ("frame_cache", "rejects")}
    tables["index"] = [entry]
    stored = sum(one["bytes"] for one in tables["frame_cache"])
    counts = {"read": read, "written": frames, "rejected": {"corrupt_media": lost} if lost else {}}
    statistics = {"bytes_per_frame": each, "stored_bytes_per_frame": stored / max(1, frames)}
    return manifest.write_manifest(job, run_id, started, counts=counts, tables=tables, statistics=statistics)
