"""The trials of a sweep: which values go together, what a trial is called, and the jobs that it is made of."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from voco.job.spec import Job
from voco.store import storage


class Trial(NamedTuple):
    """One point of a sweep: a training job, and the evaluations of its checkpoint, bounds first."""

    name: str
    values: dict[str, Any]  # dotted key -> value
    train: Job  # its output is `<sweep output>/runs/<name>/train`
    evaluations: list[Job]

    @property
    def is_bound(self) -> bool:
        return self.train.compression is not None and self.train.compression.method == "none"


def sweep_trials(job: Job) -> list[Trial]:
    """The trials of a sweep, in the order of its axes.

    A trial of method none is the upper bound of those that differ from it in compression alone; read under the voco mask
    it is their lower bound. Raises ValueError or pydantic's error for a value that cannot be.
    """
    assert job.sweep is not None
    raw = job.sweep.train.model_dump(exclude_none=True, exclude_unset=True)
    raw |= {"seed": job.sweep.train.seed}
    raw |= {key: getattr(job.sweep.train, key).model_dump(exclude_none=True) for key in ("resources", "tracking")}
    found: list[Trial] = []
    outside = [key for key in job.sweep.axes if key.split(".")[0] in ("inputs", "output", "name", "kind")]
    if outside:
        raise ValueError(f"{outside[0]}: expected a key of a block, compression or resources, or seed")
    for values in axis_product(job.sweep.axes):
        name = trial_name(values)
        if name in [trial.name for trial in found]:
            raise ValueError(f"two trials would be called {name}")
        place = storage.join(job.output, "runs", name)
        train = Job.model_validate({**with_values(raw, values), "name": name[:40], "output": f"{place}/train"})
        found.append(Trial(name, values, train, []))
    for trial in found:
        same = [one for one in found if one.is_bound and _beside(one.values) == _beside(trial.values)]
        trial.evaluations.extend(_evaluations(job, trial, same[0] if same else None))
    return found


def _beside(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a trial that are not about compression."""
    return {key: value for key, value in values.items() if key.split(".")[0] != "compression"}


def _evaluations(job: Job, trial: Trial, bound: Trial | None) -> list[Job]:
    assert job.sweep is not None
    plain = job.sweep.evaluate
    if plain.block.read_as != "own":
        raise ValueError("sweep.evaluate.evaluate.read_as: a sweep reads its own bounds: expected own")
    compression = trial.train.compression
    if plain.block.tokens is not None and compression is not None:
        if compression.method != "voco":  # every N' is of <voco>; the others have one reading
            plain = plain.model_copy(update={"evaluate": plain.block.model_copy(update={"tokens": None})})
        elif max(plain.block.tokens) > compression.tokens:
            got = f"trial {trial.name} has {compression.tokens}"
            raise ValueError(f"sweep.evaluate.evaluate.tokens: expected at most each trial's N, got {plain.block.tokens}: {got}")
    place = storage.join(job.output, "runs", trial.name)

    def answers(name: str, **inputs: str) -> Job:
        changes = {"name": f"{name}-{trial.name}"[:40], "output": f"{place}/{name}"}
        held = plain.inputs.model_copy(update={"checkpoint": trial.train.output, **inputs})
        return plain.model_copy(update={**changes, "inputs": held})

    if trial.is_bound and plain.block.frames == "all":
        block = plain.block.model_copy(update={"read_as": "voco"})
        return [answers("answers"), answers("lower").model_copy(update={"evaluate": block})]
    if bound is None:
        return [answers("answers")]
    theirs = storage.join(job.output, "runs", bound.name)
    return [answers("answers", upper=f"{theirs}/answers", lower=f"{theirs}/lower")]


def axis_product(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, the last axis fastest: {dotted key: value} each.

    An axis may be a whole block, e.g. `compression: [{method: voco, tokens: 1}, {method: none, tokens: 1}]`, for
    combinations that are no full product.
    """
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def trial_name(values: Mapping[str, Any]) -> str:
    """What a trial is called: its values joined, fit for a path and a job's name; `voco-4` for method voco, tokens 4."""
    return "-".join(_word(value) for value in values.values())


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "-".join(_word(inner) for inner in value.values())
    return re.sub(r"[^a-z0-9]+", "-", str(value).lower()).strip("-")


def with_values(job: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a job with each value at its dotted key. Raises KeyError for a path that runs through no mapping."""
    changed: dict[str, Any] = copy.deepcopy(dict(job))
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        place: Any = changed
        for part in path:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise KeyError(f"{dotted}: {'.'.join(path)} is no block")
        place[last] = value
    return changed
