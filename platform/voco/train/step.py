"""One optimizer step whose loss is the mean over all supervised tokens of the global batch, however it is cut."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from voco.model.batch import Batch, CachedBatch


class NonFinite(Exception):
    """Loss or gradient is not a number any more; says at which step and for which samples. Raised on every rank."""


class NothingLearned(Exception):
    """No step so far had a token to learn from. Raised on every rank."""


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all ranks."""

    loss: float  # mean over supervised tokens
    kl: float | None  # of the distillation, likewise
    tokens: int  # supervised
    cut: int  # text tokens for which max_tokens left no room
    grad_norm: float  # before clipping
    sample_ids_sha256: str  # of what was trained on: sha256 over each rank's sha256, in rank order
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
class BackwardResult:
    """Gradients are in place and reduced; nothing is updated yet."""

    loss: float
    kl: float | None
    tokens: int
    cut: int
    stop: bool


def backward(engine: Any, batches: Sequence[Batch | CachedBatch], step: int, stop: bool, cut: int = 0) -> BackwardResult:
    """Forward and backward of this rank's micro-batches, of whose text `cut` tokens were left out.

    Every rank's gradient of sum/count is wanted, with one count for all. DeepSpeed averages gradients over ranks and
    divides each loss by the accumulation steps, so the local sum is scaled by (ranks x accumulation / count).
    The count is known before the first backward, by one all-reduce, which also carries what was cut and the wish to stop.
    Raises NonFinite when the global loss is not finite, naming the samples of the micro-batches whose own loss is not.
    """
    device = engine.device
    facts = torch.tensor([sum(len(batch.predict_id) for batch in batches), cut, int(stop)], device=device)
    dist.all_reduce(facts)
    count, lost, asked = facts.tolist()
    scale = dist.get_world_size() * len(batches) / max(1, count)
    losses, divergence = torch.zeros(len(batches), device=device), torch.zeros((), device=device)
    distils = False
    for index, batch in enumerate(batches):
        found = engine(batch.to(device, torch.float32))
        distils = isinstance(found, tuple)
        loss = found[0] if distils else found
        divergence += found[1] if distils else 0.0
        losses[index] = loss.detach()
        engine.backward(loss * scale)
        if index < len(batches) - 1:
            engine.step()  # counts the micro-batch; weights move at the boundary only
    totals = torch.stack((losses.sum(), divergence))
    dist.all_reduce(totals)
    mean, kl = (totals / max(1, count)).tolist()
    if not math.isfinite(mean):
        bad = [batch for loss, batch in zip(losses.tolist(), batches, strict=True) if not math.isfinite(loss)]
        guilty = [sample_id for batch in bad for sample_id in batch.sample_ids]
        raise NonFinite(f"loss is {mean} at step {step}; samples: {', '.join(_gather(guilty))}")
    return BackwardResult(mean, kl if distils else None, count, lost, bool(asked))


def _gather(mine: list[str]) -> list[str]:
    """A list of every rank's items, in rank order."""
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [item for theirs in everyone for item in theirs]


def sample_ids_digest(batches: Sequence[Batch | CachedBatch], device: Any) -> str:
    """What `StepResult.sample_ids_sha256` holds; one small collective."""
    ids = "\n".join(sample_id for batch in batches for sample_id in batch.sample_ids)
    mine = torch.frombuffer(bytearray(hashlib.sha256(ids.encode()).digest()), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return hashlib.sha256(b"".join(one.cpu().numpy().tobytes() for one in everyone)).hexdigest()


def train_step(engine: Any, batches: Sequence[Batch | CachedBatch], step: int, stop: bool, cut: int) -> StepResult:
    """One optimizer step over the global batch, of which `batches` are this rank's micro-batches; as `backward`."""
    ids = sample_ids_digest(batches, engine.device)
    done = backward(engine, batches, step, stop, cut)
    engine.step()
    norm = float(engine.get_global_grad_norm() or 0.0)
    if not math.isfinite(norm):  # the weights are lost with it: end before they reach a checkpoint
        raise NonFinite(f"the gradient's norm is {norm} at step {step}, loss {done.loss}")
    return StepResult(done.loss, done.kl, done.tokens, done.cut, norm, ids, done.stop)
