"""The trials of a sweep: their values, names and jobs."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from voco.job.evaluation import Evaluate
from voco.job.spec import Job, Sweep
from voco.job.tables import METHODS
from voco.store import storage


class Trial(NamedTuple):
    """One point of a sweep: a training job, and the evaluations of its checkpoint, bounds first."""

    name: str
    values: dict[str, Any]  # dotted key -> value
    train: Job  # its output is `<sweep output>/runs/<name>/train`
    evaluations: list[Job]

    @property
    def is_bound(self) -> bool:
        return self.train.compression is not None and METHODS[self.train.compression.method].uncompressed


def sweep_trials(job: Job) -> list[Trial]:
    """The trials of a sweep, in the order of its axes.

    A trial of method none is the upper bound of those that differ from it in compression alone; read under the voco mask
    it is their lower bound. Raises ValueError or pydantic's error for an impossible value.
    """
    sweep: Sweep = job.block
    outside = [key for key in sweep.axes if key.split(".")[0] in ("inputs", "output", "name", "kind")]
    if outside:
        raise ValueError(f"{outside[0]}: expected a key of a block, compression or resources, or seed")
    template = sweep.train.model_dump(exclude_none=True, exclude_unset=True) | {"seed": sweep.train.seed}
    template |= {key: getattr(sweep.train, key).model_dump(exclude_none=True) for key in ("resources", "tracking")}
    trials: list[Trial] = []
    for values in axis_product(sweep.axes):
        name = trial_name(values)
        if name in [trial.name for trial in trials]:
            raise ValueError(f"two trials would be called {name}")
        output = f"{_trial_uri(job, name)}/train"
        train = Job.model_validate({**with_values(template, values), "name": name[:40], "output": output})
        trials.append(Trial(name, values, train, []))
    for trial in trials:
        bounds = [bound for bound in trials if bound.is_bound and _other_values(bound.values) == _other_values(trial.values)]
        trial.evaluations.extend(_evaluations(job, trial, bounds[0] if bounds else None))
    return trials


def inner_jobs(job: Job) -> list[Job]:
    """The jobs inside a job: a flow's stages, or a sweep's trainings and evaluations."""
    if isinstance(job.block, Sweep):
        return [inner for trial in sweep_trials(job) for inner in (trial.train, *trial.evaluations)]
    return [stage for stage in job.stages if stage is not job]


def _trial_uri(job: Job, name: str) -> str:
    return storage.join(job.output, "runs", name)


def _other_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a trial that are not about compression."""
    return {key: value for key, value in values.items() if key.split(".")[0] != "compression"}


def _evaluations(job: Job, trial: Trial, bound: Trial | None) -> list[Job]:
    evaluate: Job = job.block.evaluate
    block = _evaluate_block(evaluate.block, trial)

    def evaluation(name: str, block: Evaluate, **inputs: str) -> Job:
        changes: dict[str, Any] = {"name": f"{name}-{trial.name}"[:40], "output": f"{_trial_uri(job, trial.name)}/{name}"}
        changes["inputs"] = evaluate.inputs.model_copy(update={"checkpoint": trial.train.output, **inputs})
        return evaluate.model_copy(update={**changes, "evaluate": block})

    if trial.is_bound and block.frames == "all":
        lower = evaluation("lower", block.model_copy(update={"read_as": "voco"}))
        return [evaluation("answers", block), lower]
    bounds: dict[str, str] = {}
    if bound is not None:
        uri = _trial_uri(job, bound.name)
        bounds = {"upper": f"{uri}/answers", "lower": f"{uri}/lower"}
    evaluations = [evaluation("answers", block, **bounds)]
    compression = trial.train.compression
    if compression is not None and compression.share_whole and evaluate.inputs.frame_cache is None:
        evaluations.append(evaluation("whole", block.model_copy(update={"tokens": None, "read_as": "none"}), **bounds))
    return evaluations


def _evaluate_block(block: Evaluate, trial: Trial) -> Evaluate:
    """The sweep's evaluate block, without what this trial's method cannot do; elastic trials answer at every N by default."""
    if block.read_as != "own":
        raise ValueError("sweep.evaluate.evaluate.read_as: a sweep reads its own bounds: expected own")
    compression = trial.train.compression
    if block.tokens is None and compression is not None and len(compression.sizes) > 1:
        return block.model_copy(update={"tokens": list(compression.sizes)})
    if block.is_adaptive:
        raise ValueError("sweep.evaluate.evaluate.tokens: auto needs a threshold for each trial; expected numbers, or nothing")
    if block.tokens is None or compression is None:
        return block
    if not METHODS[compression.method].views_apart:  # only <voco> tokens can be read at a smaller N'
        return block.model_copy(update={"tokens": None})
    if max(block.fixed_tokens) > compression.most_tokens:
        got = f"trial {trial.name} has {compression.most_tokens}"
        raise ValueError(f"sweep.evaluate.evaluate.tokens: expected at most each trial's N, got {block.tokens}: {got}")
    return block


def axis_product(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, the last axis fastest: {dotted key: value} each.

    An axis may be an entire block, e.g. `compression: [{method: voco, tokens: 1}, {method: none, tokens: 1}]`, for
    combinations that are not a full product.
    """
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def trial_name(values: Mapping[str, Any]) -> str:
    """A trial's name: its values joined, valid in a path and as a job's name; `voco-4` for method voco, tokens 4."""
    return "-".join(_name_part(value) for value in values.values())


def _name_part(value: Any) -> str:
    if isinstance(value, Mapping):
        return "-".join(_name_part(inner) for inner in value.values())
    return re.sub(r"[^a-z0-9]+", "-", str(value).lower()).strip("-")


def with_values(job: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a job with each value at its dotted key. Raises KeyError for a path through something that is not a mapping."""
    changed: dict[str, Any] = copy.deepcopy(dict(job))
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        block: Any = changed
        for part in path:
            block = block.setdefault(part, {}) if isinstance(block, dict) else None
        if not isinstance(block, dict):
            raise KeyError(f"{dotted}: {'.'.join(path)} is not a block")
        block[last] = value
    return changed
