"""One optimizer step whose loss is the mean over all supervised tokens of the global batch, however it is split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from voco.errors import one_line
from voco.job.config import virtual_ranks
from voco.model.batch import Batch, CachedBatch
from voco.train.batches import StepData
from voco.train.live_images import UndecodableImage
from voco.train.sampler import served
from voco.train.step_metrics import NO_FACTS, StepFacts

# errors of an operating system that a new start does not cure
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class NonFinite(Exception):
    """The loss or gradient is no longer finite. The message names the step and the samples. Raised on every rank."""


class UnusableData(Exception):
    """A rank cannot make its batches of a step. The message is that rank's. Raised on every rank."""


class DataLost(Exception):
    """A rank cannot read its data now: workers that start again, from the last checkpoint, may. Raised on every rank."""


class NothingLearned(Exception):
    """No step so far had a supervised token. Raised on every rank."""


@dataclass(frozen=True)
class BackwardResult:
    """Gradients are computed and reduced; no weight has changed yet."""

    loss: float  # mean over supervised tokens
    kl: float | None  # of a distillation, likewise
    tokens: int  # supervised
    cut: int  # text tokens left out because of max_tokens
    stop: int  # rank 0's notice: 0, or why no further step is wanted
    wait: float  # seconds that the slowest rank waited for its data
    facts: StepFacts  # of all ranks
    voco_norm: float | None  # L2 norm of the embedding of <voco> before the step
    losses: torch.Tensor  # (M,) sums over the predictions of this rank's M micro-batches, on its device


@dataclass(frozen=True)
class StepResult(BackwardResult):
    """What one step did, over all ranks."""

    grad_norm: float  # before clipping
    sample_ids_sha256: str  # of the samples in the order of the global batch, the same for any number of ranks


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
    stop: int,
    cut: int = 0,
    wait: float = 0.0,
    problem: UnusableData | DataLost | None = None,
    facts: StepFacts = NO_FACTS,
    norm: torch.Tensor | None = None,
    filler: Batch | CachedBatch | None = None,
) -> BackwardResult:
    """Forward and backward of this rank's micro-batches, as `run_passes`; waits for the device. Raises NonFinite when the global
    loss is not finite, naming the samples of the micro-batches whose own loss is not.
    """
    passes = run_passes(engine, batches, stop, cut, wait, problem, facts, norm, filler)
    return passes.result(passes.sums.tolist(), step)


@dataclass(frozen=True)
class Passes:
    """The passes of a step, which a device may still be computing."""

    sums: torch.Tensor  # (3,) of all ranks: loss and divergence by supervised token, and the norm that was given
    losses: torch.Tensor  # (M,) as BackwardResult.losses
    batches: Sequence[Batch | CachedBatch]  # this rank's
    tokens: int
    cut: int
    stop: int
    wait: float
    facts: StepFacts
    distils: bool
    has_norm: bool

    def result(self, values: Sequence[float], step: int) -> BackwardResult:
        """With the `values` of `sums`. Raises NonFinite on every rank for a loss that is not finite."""
        mean, kl, norm = values
        if not math.isfinite(mean):
            bad = [batch for loss, batch in zip(self.losses.tolist(), self.batches, strict=True) if not math.isfinite(loss)]
            sample_ids = _gather([sample_id for batch in bad for sample_id in batch.sample_ids])
            raise NonFinite(f"loss is {mean} at step {step}; samples: {', '.join(sample_ids)}")
        divergence, voco_norm = kl if self.distils else None, norm if self.has_norm else None
        counts = (self.tokens, self.cut, self.stop, self.wait)
        return BackwardResult(mean, divergence, *counts, self.facts, voco_norm, self.losses)


def run_passes(
    engine: Any,
    batches: Sequence[Batch | CachedBatch],
    stop: int,
    cut: int,
    wait: float,
    problem: UnusableData | DataLost | None,
    facts: StepFacts,
    norm: torch.Tensor | None,
    filler: Batch | CachedBatch | None,
) -> Passes:
    """Forward and backward of this rank's micro-batches, whose text lost `cut` tokens to max_tokens; it waited `wait` s for them.

    The gradient is that of sum/count with one count for all ranks. DeepSpeed averages gradients over ranks, so the local sum
    is scaled by ranks / count. The count is known before the first backward, from one all-reduce that also carries the cut
    tokens, the stop flag, each rank's wait and number of micro-batches, and `facts`. A rank with fewer micro-batches than
    another repeats `filler`, which predicts nothing, because all take part in each backward pass.
    `norm`, a scalar on the device, the same on every rank, is read together with the loss.
    Raises UnusableData or DataLost when a rank has such a `problem` instead of batches.
    """
    device = engine.device
    rank, world = dist.get_rank(), dist.get_world_size()
    waits = [0] * world
    waits[rank] = round(wait * 1e6)
    supervised = sum(len(batch.predict_id) for batch in batches)
    numbers = [0] * world
    numbers[rank] = len(batches)
    own = [supervised, cut, stop, int(problem is not None), *waits, *numbers, *facts.packed(rank, world)]
    totals = torch.tensor(own, device=device)
    dist.all_reduce(totals)
    count, cut_tokens, stops, problems, *others = totals.tolist()
    waits, numbers, facts = others[:world], others[world : 2 * world], StepFacts.unpacked(others[2 * world :])
    if problems:
        raise joined_problems(problem)
    passes = list(batches)
    if len(passes) < max(numbers):
        assert filler is not None, f"micro-batches by rank: {numbers}"
        passes += [filler] * (max(numbers) - len(passes))
    scale = world / max(1, count)
    losses, divergence = torch.zeros(len(passes), device=device), torch.zeros((), device=device)
    distils = False
    for index, batch in enumerate(passes):
        result = engine(batch.to(device, torch.float32))
        distils = isinstance(result, tuple)
        loss = result[0] if distils else result
        divergence += result[1] if distils else 0.0
        losses[index] = loss.detach()
        # by hand, because the number of micro-batches may differ from step to step
        engine.set_gradient_accumulation_boundary(index == len(passes) - 1)
        engine.backward(loss * scale, scale_wrt_gas=False)
    norms = divergence.new_zeros(()) if norm is None else norm.to(divergence) * max(1, count) / world
    sums = torch.stack((losses.sum(), divergence, norms))
    dist.all_reduce(sums)
    wait_s, own_losses = max(waits) / 1e6, losses[: len(batches)]
    sums = sums / max(1, count)
    return Passes(sums, own_losses, batches, count, cut_tokens, stops, wait_s, facts, distils, norm is not None)


def worst_samples(result: BackwardResult, batches: Sequence[Batch | CachedBatch]) -> list[str]:
    """The ids of the samples of the micro-batch, of any rank, whose loss by token was largest. All ranks must call it."""
    counts = torch.tensor([max(1, len(batch.predict_id)) for batch in batches], device=result.losses.device)
    mean, index = (result.losses / counts).max(0)
    return list(max(_gather([(float(mean), batches[int(index)].sample_ids)]))[1])


def problem_of(error: Exception) -> UnusableData | DataLost:
    """What an error of the thread that prepares data means for the run.

    Storage that does not answer may be back when the workers start again. Anything else would happen again in the same step.
    """
    if isinstance(error, OSError) and not isinstance(error, LASTING):
        return DataLost(one_line(error))
    return UnusableData(str(error) if isinstance(error, UndecodableImage) else one_line(error))


def joined_problems(problem: UnusableData | DataLost | None) -> UnusableData | DataLost:
    """The problems of all ranks as one error; lost data is what a new start may cure, unless other data is unusable.

    All ranks call it with their own, once they have agreed that there is one.
    """
    problems: list[UnusableData | DataLost] = _gather([] if problem is None else [problem])
    unusable = [problem for problem in problems if isinstance(problem, UnusableData)]
    text = "; ".join(dict.fromkeys(str(problem) for problem in unusable or problems))
    return UnusableData(text) if unusable else DataLost(text)


def _gather(items: list[Any]) -> list[Any]:
    """Every rank's items as one list, in rank order."""
    by_rank: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, items)
    return [item for rank_items in by_rank for item in rank_items]


def sample_ids_digest(sample_ids: Sequence[str], global_batch: int, device: Any) -> str:
    """`StepResult.sample_ids_sha256`: sha256 over the sha256 of each virtual rank's ids. One small collective."""
    pieces = virtual_ranks(global_batch)
    share, digests = global_batch // pieces, torch.zeros(pieces, 32, dtype=torch.uint8)
    for at, piece in enumerate(served(global_batch, dist.get_rank(), dist.get_world_size())):
        ids = "\n".join(sample_id for sample_id in sample_ids[at * share : (at + 1) * share] if sample_id)
        digests[piece] = torch.frombuffer(bytearray(hashlib.sha256(ids.encode()).digest()), dtype=torch.uint8)
    digests = digests.to(device)
    dist.all_reduce(digests)  # each row is set by one rank
    return hashlib.sha256(digests.cpu().numpy().tobytes()).hexdigest()


def train_step(
    engine: Any,
    data: StepData,
    global_batch: int,
    step: int,
    stop: int,
    wait: float,
    problem: UnusableData | DataLost | None = None,
    memory_bytes: int = 0,
    norm: torch.Tensor | None = None,
) -> StepResult:
    """One optimizer step over the global batch, of which `data` is this rank's part; as `run_passes`.

    Raises NonFinite when the loss or the gradient's norm is not finite: the weights may not be either, so the run must end before
    they reach a checkpoint. The host waits for a device only at the end, when it reads both: it prepares the optimizer's work
    while the device still computes, and the device is idle when the next step's counts are exchanged.
    """
    digest = sample_ids_digest(data.sample_ids, global_batch, engine.device)
    facts = replace(data.facts, memory_bytes=memory_bytes)
    passes = run_passes(engine, data.batches, stop, data.cut, wait, problem, facts, norm, data.filler)
    engine.step()
    global_norm = engine.get_global_grad_norm()  # a tensor on the device, or None before the first gradient
    sums = passes.sums
    norms = torch.as_tensor(0.0 if global_norm is None else global_norm, dtype=sums.dtype, device=sums.device)
    *values, grad_norm = torch.cat((sums, norms[None])).tolist()
    result = passes.result(values, step)
    if not math.isfinite(grad_norm) or grad_norm < 0:  # DeepSpeed 0.19.8 writes -1 for a norm that is not finite
        raise NonFinite(f"the gradient's norm is not finite at step {step}, loss {result.loss}")
    return StepResult(**vars(result), grad_norm=grad_norm, sample_ids_sha256=digest)
