"""One ingest of `bench/ingest_s3.py` in its own process: `ingest_s3_run.py CASE OUT` prints its figures as one JSON line.

The source is in s3://bucket, the output on disk, and one process does the work. `seconds` are those of the job, without imports.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import ingest_runs
import s3fs  # noqa: F401 - its import is no part of the job

import pipelines

SOURCE = "s3://bucket/source"
try:
    from voco.job.load import build_job
except ImportError:  # the earlier build
    from voco.spec import build as build_job

CASES: dict[str, tuple[str, dict[str, str]]] = {
    "images": ("llava_json", {"annotations": f"{SOURCE}/mix.json", "media": f"{SOURCE}/images"}),
    "zip": ("llava_json", {"annotations": f"{SOURCE}/mix.json", "media": f"{SOURCE}/images.zip"}),
    "tar": ("webdataset", {"annotations": f"{SOURCE}/shards"}),
    "videos": ("webvid_csv", {"annotations": f"{SOURCE}/videos.csv", "media": f"{SOURCE}/videos"}),
}


def run(case: str, out: str) -> dict[str, Any]:
    layout, inputs = CASES[case]
    raw = ingest_runs.job(Path(), out, format=layout, in_process_rows=1_000_000)
    raw["inputs"] = inputs
    work = build_job("bench", raw)
    started, used = time.perf_counter(), time.process_time()
    counts = pipelines.run(work).counts
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"written": counts["written"], "seconds": seconds, "cpu_s": cpu, "peak_mib": peak}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2])))
