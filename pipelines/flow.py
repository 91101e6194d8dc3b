"""Reads what its stages read; writes each stage's output and one manifest whose parents are the stages."""

from __future__ import annotations

import time

import pipelines
from voco.errors import Stopped
from voco.job.spec import Job, resolve_stage
from voco.run import claim, manifest
from voco.run.manifest import Manifest
from voco.store import storage


def run(job: Job, run_id: str) -> Manifest:
    """Every stage in order. A stage that is finished says so and is kept, so a killed flow continues.

    With `--replace`, a stage whose own run changed (its block, or an input of it) is made again; the others are kept.
    """
    started = time.time()
    assert job.flow is not None
    replace = manifest.is_replacing(storage.resolve(job.output))
    stages = job.flow.stages
    outputs: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        if claim.is_stopping():
            raise Stopped(f"{job.name}: stopped before {stage.name}; sent again, it continues there")
        print(f"[{number}/{len(stages)}] {stage.name}: {stage.kind}", flush=True)
        began = time.monotonic()
        done = pipelines.run(resolve_stage(stage, outputs), replace)
        outputs[stage.name] = stage.output
        seconds[stage.name] = done.seconds
        print(f"[{number}/{len(stages)}] {stage.name}: {time.monotonic() - began:.1f} s", flush=True)
    print(f"{job.name}: {len(stages)} stages in {time.time() - started:.1f} s", flush=True)
    return manifest.write_manifest(job, run_id, started, statistics={"stage_seconds": seconds})
