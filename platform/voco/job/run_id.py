"""The run id: a hash of everything in a job that decides its output, as eight hex digits."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from voco.job.benchmarks import DEFAULT_METRIC, default_metric
from voco.job.evaluation import Evaluate
from voco.job.spec import Flow, Job, Sweep
from voco.job.tables import AUTO

# keys that do not change what a job writes: limits at which it fails, and where and how parallel it works
UNHASHED = {"max_missing_share", "max_reject_share", "allow_empty", "in_process_rows", "download_threads", "expect"}
UNHASHED |= {"micro_tokens", "compile", "offload"}
# keys added later: left out while unset, so that older run ids stay valid
UNHASHED_DEFAULTS = {"metric", "limit", "adam_beta2", "system", "dtype", "lora", "validate"}
UNHASHED_DEFAULTS |= {"draw", "uncompressed_share", "budget"}


def hashed_content(job: Job) -> dict[str, Any]:
    """What is hashed besides the state of each input: kind, seed, inputs and blocks. Not resources, output or tracking."""
    content: dict[str, Any] = {"kind": job.kind, "seed": job.seed}
    if isinstance(job.block, Flow):
        return content | {"stages": [{**hashed_content(stage), "name": stage.name} for stage in job.block.stages]}
    if isinstance(job.block, Sweep):
        return content | {"axes": job.block.axes, **{path: hashed_content(part) for path, part in job.parts.items()}}
    blocks = {"compression": job.compression, "model": job.model, job.kind: job.block}
    roles = job.inputs.model_dump(exclude_none=True, exclude_defaults=True)  # which input is which, and its weight
    return content | {"inputs": roles, **{key: _hashed(block) for key, block in blocks.items() if block is not None}}


def _hashed(block: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = block.model_dump(exclude=UNHASHED)
    if dumped.get("attention") == AUTO:  # the default was segments, and all backends give the same result
        dumped["attention"] = "segments"
    if isinstance(block, Evaluate) and block.metric is None and (metric := default_metric(block.benchmark)) != DEFAULT_METRIC:
        dumped["metric"] = metric  # under gqa run ids stay what they were when it marked every benchmark
    return _without_unset(dumped)


def _without_unset(dumped: dict[str, Any]) -> dict[str, Any]:
    """The block without its unset keys of UNHASHED_DEFAULTS, in nested blocks too."""
    return {
        key: _without_unset(value) if isinstance(value, dict) else value
        for key, value in dumped.items()
        if value is not None or key not in UNHASHED_DEFAULTS
    }


def compute_run_id(job: Job, inputs: dict[str, str]) -> str:
    """`name` and 8 hex digits over the job's content and `inputs`: each input URI with what identifies its state."""
    text = json.dumps({**hashed_content(job), "input_states": inputs}, sort_keys=True)
    return f"{job.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
