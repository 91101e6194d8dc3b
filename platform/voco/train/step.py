"""One optimizer step whose loss is the mean over all supervised tokens of the global batch, however it is split."""

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
    """The loss or gradient is no longer finite. The message names the step and the samples. Raised on every rank."""


class UnusableData(Exception):
    """A rank cannot make its batches of a step. The message is that rank's. Raised on every rank."""


class NothingLearned(Exception):
    """No step so far had a supervised token. Raised on every rank."""


@dataclass(frozen=True)
class BackwardResult:
    """Gradients are computed and reduced; no weight has changed yet."""

    loss: float  # mean over supervised tokens
    kl: float | None  # of a distillation, likewise
    tokens: int  # supervised
    cut: int  # text tokens left out because of max_tokens
    stop: bool  # the run was asked to stop
    wait: float  # seconds that the slowest rank waited for its data


@dataclass(frozen=True)
class StepResult(BackwardResult):
    """What one step did, over all ranks."""

    grad_norm: float  # before clipping
    sample_ids_sha256: str  # of the samples: sha256 over each rank's sha256, in rank order


def learning_rate(step: int, total: int, peak: float, warmup_share: float, final_share: float) -> float:
    """Linear warm-up over the first `warmup_share` of `total` steps, then a cosine down to `final_share` of the peak.

    `step` counts from 0; the first step already has a rate above zero.
    """
    warmup = max(1, round(warmup_share * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))


def backward(
    engine: Any,
    batches: Sequence[Batch | CachedBatch],
    step: int,
    stop: bool,
    cut: int = 0,
    wait: float = 0.0,
    problem: str = "",
) -> BackwardResult:
    """Forward and backward of this rank's micro-batches, whose text lost `cut` tokens to max_tokens; it waited `wait` s for them.

    The gradient is that of sum/count with one count for all ranks. DeepSpeed averages gradients over ranks and divides
    each loss by the accumulation steps, so the local sum is scaled by (ranks x accumulation / count). The count is known
    before the first backward, from one all-reduce that also carries the cut tokens, the stop flag and each rank's wait.
    Raises NonFinite when the global loss is not finite, naming the samples of the micro-batches whose own loss is not, and
    UnusableData when a rank has a `problem` instead of batches.
    """
    device = engine.device
    waits = [0] * dist.get_world_size()
    waits[dist.get_rank()] = round(wait * 1e6)
    supervised = sum(len(batch.predict_id) for batch in batches)
    totals = torch.tensor([supervised, cut, int(stop), int(bool(problem)), *waits], device=device)
    dist.all_reduce(totals)
    count, cut_tokens, stops, problems, *waits = totals.tolist()
    if problems:
        raise UnusableData("; ".join(_gather([problem] if problem else [])))
    scale = dist.get_world_size() * len(batches) / max(1, count)
    losses, divergence = torch.zeros(len(batches), device=device), torch.zeros((), device=device)
    distils = False
    for index, batch in enumerate(batches):
        result = engine(batch.to(device, torch.float32))
        distils = isinstance(result, tuple)
        loss = result[0] if distils else result
        divergence += result[1] if distils else 0.0
        losses[index] = loss.detach()
        engine.backward(loss * scale)
        if index < len(batches) - 1:
            engine.step()  # counts the micro-batch; weights change at the boundary only
    sums = torch.stack((losses.sum(), divergence))
    dist.all_reduce(sums)
    mean, kl = (sums / max(1, count)).tolist()
    if not math.isfinite(mean):
        bad = [batch for loss, batch in zip(losses.tolist(), batches, strict=True) if not math.isfinite(loss)]
        sample_ids = _gather([sample_id for batch in bad for sample_id in batch.sample_ids])
        raise NonFinite(f"loss is {mean} at step {step}; samples: {', '.join(sample_ids)}")
    return BackwardResult(mean, kl if distils else None, count, cut_tokens, bool(stops), max(waits) / 1e6)


def _gather(items: list[str]) -> list[str]:
    """Every rank's items as one list, in rank order."""
    by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, items)
    return [item for rank_items in by_rank for item in rank_items]


def sample_ids_digest(batches: Sequence[Batch | CachedBatch], device: Any) -> str:
    """`StepResult.sample_ids_sha256`; one small collective."""
    ids = "\n".join(sample_id for batch in batches for sample_id in batch.sample_ids)
    digest = torch.frombuffer(bytearray(hashlib.sha256(ids.encode()).digest()), dtype=torch.uint8).to(device)
    by_rank = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(by_rank, digest)
    return hashlib.sha256(b"".join(rank_digest.cpu().numpy().tobytes() for rank_digest in by_rank)).hexdigest()


def train_step(
    engine: Any,
    batches: Sequence[Batch | CachedBatch],
    step: int,
    stop: bool,
    cut: int,
    wait: float,
    problem: str = "",
) -> StepResult:
    """One optimizer step over the global batch, of which `batches` are this rank's micro-batches; as `backward`."""
    digest = sample_ids_digest(batches, engine.device)
    result = backward(engine, batches, step, stop, cut, wait, problem)
    engine.step()
    norm = float(engine.get_global_grad_norm() or 0.0)
    if not math.isfinite(norm):  # the weights are no longer finite either: end before they reach a checkpoint
        raise NonFinite(f"the gradient's norm is {norm} at step {step}, loss {result.loss}")
    return StepResult(**vars(result), grad_norm=norm, sample_ids_sha256=digest)
