"""One optimizer step whose loss is the mean over all supervised tokens of the global batch, however it is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from voco.model.batch import Batch


class NonFiniteLoss(Exception):
    """The loss is not a number any more; says at which step and for which samples."""


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all ranks."""

    loss: float  # mean over supervised tokens
    tokens: int  # supervised
    grad_norm: float  # before clipping
    stop: bool  # somebody asked this run to stop


def learning_rate(step: int, total: int, peak: float, warmup_share: float, final_share: float) -> float:
    """Linear warm-up over the first `warmup_share` of `total` steps, then a cosine down to `final_share` of the peak.

    `step` counts from 0; the first step already has a rate above zero.
    """
    warmup = max(1, round(warmup_share * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Backward:
    """Gradients are in place and reduced; nothing is updated yet."""

    loss: float
    tokens: int
    stop: bool


def backward(engine: Any, batches: Sequence[Batch], step: int, stop: bool) -> Backward:
    """Forward and backward of this rank's micro-batches.

    Every rank's gradient of sum/count is wanted, with one count for all. DeepSpeed averages gradients over ranks and
    divides each loss by the accumulation steps, so the local sum is scaled by (ranks x accumulation / count).
    The count is known before the first backward, by one all-reduce, which also carries the wish to stop.
    Raises NonFiniteLoss on every rank when the global loss is not finite.
    """
    device = engine.device
    facts = torch.tensor([sum(len(batch.predict_id) for batch in batches), int(stop)], device=device)
    dist.all_reduce(facts)
    count, asked = int(facts[0]), bool(facts[1])
    scale = dist.get_world_size() * len(batches) / max(1, count)
    total = torch.zeros((), device=device)
    for index, batch in enumerate(batches):
        loss = engine(batch.to(device, torch.float32))
        total += loss.detach()
        engine.backward(loss * scale)
        if index < len(batches) - 1:
            engine.step()  # counts the micro-batch; weights move at the boundary only
    dist.all_reduce(total)
    mean = float(total) / max(1, count)
    if not math.isfinite(mean):
        ids = [sample_id for batch in batches for sample_id in batch.sample_ids]
        raise NonFiniteLoss(f"loss is {mean} at step {step}; this rank's samples: {', '.join(ids)}")
    return Backward(mean, count, asked)


def train_step(engine: Any, batches: Sequence[Batch], step: int, stop: bool) -> StepResult:
    """One optimizer step over the global batch, of which `batches` are this rank's micro-batches."""
    done = backward(engine, batches, step, stop)
    engine.step()
    return StepResult(done.loss, done.tokens, float(engine.get_global_grad_norm() or 0.0), done.stop)
