"""Reads what its stages read; writes each stage's output and one manifest whose parents are the stages."""

from __future__ import annotations

import time

import pipelines
from voco import manifest, running, storage
from voco.errors import Stopped
from voco.manifest import Manifest
from voco.spec import Job, stage_with_inputs


def run(job: Job, run_id: str) -> Manifest:
    """Every stage in order. A stage that is finished says so and is kept, so a killed flow continues.

    With `--replace`, a stage whose own run changed (its block, or an input of it) is made again; the others are kept.
    """
    started = time.time()
    assert job.flow is not None
    replace = manifest.replacing(storage.resolve(job.output))
    stages = job.flow.stages
    outputs: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        if running.stopping():
            raise Stopped(f"{job.name}: stopped before {stage.name}; sent again, it continues there")
        print(f"[{number}/{len(stages)}] {stage.name}: {stage.kind}", flush=True)
        began = time.monotonic()
        done = pipelines.run(stage_with_inputs(stage, outputs), replace)
        outputs[stage.name] = stage.output
        seconds[stage.name] = done.seconds
        print(f"[{number}/{len(stages)}] {stage.name}: {time.monotonic() - began:.1f} s", flush=True)
    print(f"{job.name}: {len(stages)} stages in {time.time() - started:.1f} s", flush=True)
    return manifest.finish(job, run_id, started, statistics={"stage_seconds": seconds})
