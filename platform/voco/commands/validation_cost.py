"""What validation during training adds to its time, for `voco plan`: a rough figure, from the operations of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from voco.commands.estimate import Estimate
from voco.commands.rates import Rates
from voco.job.config import Training
from voco.job.spec import Job

STEP_PASSES = 3  # a step's operations over those of its forward pass


def validation_hours(job: Job, cost: Estimate, rates: Rates) -> float:
    """Hours of all workers together; 0.0 without validation, and on a GPU whose peak is unknown."""
    block = job.block
    if not isinstance(block, Training) or block.validation is None or not cost.steps:
        return 0.0
    settings, workers = block.validation, job.resources.most_workers
    speed = rates.flops(job.resources, block.precision == "bf16")
    passed = validations(block, cost.steps) * settings.rows  # rows, of all validations
    seconds = passed * cost.flops / STEP_PASSES / block.global_batch / speed if speed else 0.0
    if settings.answers:  # one question of each row
        seconds += passed * settings.max_new_tokens / rates.decode_tokens_s
    return seconds / workers / 3600


def validations(block: Training, steps: int) -> int:
    """How often a training of so many steps validates: every k steps, and after the last."""
    return 0 if block.validation is None else math.ceil(steps / block.validation.every)


def with_validation(job: Job, cost: Estimate, rates: Rates) -> Estimate:
    """The estimate of a training with its validations, which overlap with nothing."""
    hours = validation_hours(job, cost, rates)
    return replace(cost, hours={name: value + hours for name, value in cost.hours.items()}) if hours else cost


def validation_lines(jobs: Iterable[Job], estimates: dict[str, Estimate], rates: Rates) -> Iterator[str]:
    """A line for each training with validation that has an estimate, by name: rows, how often, and seconds in all."""
    for job in jobs:
        block, cost = job.block, estimates.get(str(job.name))
        if isinstance(block, Training) and block.validation is not None and cost is not None and cost.steps:
            seconds = 3600 * validation_hours(job, cost, rates)
            also = " and answers their questions" if block.validation.answers else ""
            times = f"{validations(block, cost.steps):,} times"
            share = f"{seconds / 3600 / cost.duration:.1%} of its time" if cost.duration else ""
            rows = f"up to {block.validation.rows:,} rows of {job.inputs.val}"
            yield f"{job.name}: validation reads {rows}{also} {times}, about {math.ceil(seconds):,} s, {share}"
