"""Reads the inputs of its stages; writes each stage's output and one manifest whose parents are the stages."""

from __future__ import annotations

import time

import pipelines
from voco.errors import Stopped
from voco.job.load import resolve_stage
from voco.job.spec import Job
from voco.run import claim, manifest
from voco.run.logs import get_logger
from voco.run.manifest import Manifest

log = get_logger("voco.flow")


def run(job: Job, run_id: str) -> Manifest:
    """Run every stage in order. A finished stage is kept, so a killed flow continues.

    With `--replace`, a stage whose own run changed (its block, or an input) is run again; the others are kept.
    """
    started = time.time()
    replace = manifest.is_replacing(job.output_uri)
    outputs: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for number, stage in enumerate(job.stages, 1):
        if claim.is_stopping():
            raise Stopped(f"{job.name}: stopped before {stage.name}; submitted again, it continues there")
        label = f"[{number}/{len(job.stages)}] {stage.name}"
        log.info("%s: %s", label, stage.kind)
        stage_started = time.monotonic()
        done = pipelines.run(resolve_stage(stage, outputs), replace)
        outputs[stage.name] = stage.output
        seconds[stage.name] = done.seconds
        log.info("%s: %.1f s", label, time.monotonic() - stage_started)
    log.info("%s: %d stages in %.1f s", job.name, len(job.stages), time.time() - started)
    return manifest.write_manifest(job, run_id, started, statistics={"stage_seconds": seconds})
