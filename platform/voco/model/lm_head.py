"""The vocabulary head, and the loss of supervised rows without a tensor of all their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOGITS = 1 << 24  # numbers of one chunk: 64 MiB in fp32


@dataclass(frozen=True)
class DistillTarget:
    """What a teacher says of S predictions, and how much it counts: CE + weight x T^2 x KL(teacher || student), both at T.

    Hinton et al., arXiv 1503.02531, section 2: T^2 keeps the gradient's size when T changes.
    """

    states: Tensor  # (S, teacher's width)
    head: Tensor | None  # (vocabulary, teacher's width); None: the student's own
    weight: float
    temperature: float


class LMHead(nn.Linear):
    """Stands in for transformers' output head, with its weight: logits of states, or the summed loss of states and targets.

    One module for both, because under ZeRO-3 a weight is whole only inside the module that owns it.
    """

    def __init__(self, original: nn.Linear) -> None:
        nn.Module.__init__(self)
        if original.bias is not None:
            raise ValueError("an output head with a bias is not supported")
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight = original.weight  # the same parameter: it may be the embedding table
        self.register_parameter("bias", None)

    def forward(self, states: Tensor, targets: Tensor | None = None, soft: DistillTarget | None = None) -> Any:
        """(..., V) logits of states (..., W); with int64 targets (S,) of states (S, W) the fp32 sum of their cross-entropy.

        With `soft` too, that sum with the distillation in it, and the sum of the divergences alone, which has no gradient.
        """
        if targets is None:
            return F.linear(states, self.weight)
        wanted = [torch.is_grad_enabled() and one.requires_grad for one in (states, self.weight)]
        total, divergence = SummedCrossEntropy.apply(states, self.weight, targets, *wanted, soft)  # type: ignore[no-untyped-call]
        return total if soft is None else (total, divergence)


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy, with distillation in it if asked, chunk by chunk; and the sum of the divergences.

    Both gradients are made in the forward pass, where the logits are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        wants_states: bool,
        wants_weight: bool,
        soft: DistillTarget | None,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.float64 if states.dtype == torch.float64 else torch.float32
        of_states = torch.empty_like(states) if wants_states else None
        of_weight = torch.zeros_like(weight) if wants_weight else None
        total, divergence = (torch.zeros((), dtype=exact, device=states.device) for _ in range(2))
        rows = max(1, LOGITS // len(weight))
        for start in range(0, len(states), rows):
            some, ids = states[start : start + rows], targets[start : start + rows, None]
            logits = (some @ weight.t()).to(exact)
            whole = logits.logsumexp(dim=1, keepdim=True)
            total += (whole - logits.gather(1, ids)).sum()
            pull: Tensor | None = None
            if soft is not None:
                theirs = soft.states[start : start + rows] @ (weight if soft.head is None else soft.head).t()
                apart, pull = _pull(logits, theirs.to(exact), soft.temperature)
                divergence += apart
            if of_states is None and of_weight is None:
                continue
            logits.sub_(whole).exp_()
            logits.scatter_add_(1, ids, torch.full_like(whole, -1.0))
            if soft is not None and pull is not None:
                logits.add_(pull, alpha=soft.weight * soft.temperature)  # T^2, and 1/T of the logits' own scale
            slope = logits.to(states.dtype)
            if of_states is not None:
                torch.mm(slope, weight, out=of_states[start : start + rows])
            if of_weight is not None:
                of_weight.addmm_(slope.t(), some)
        ctx.held = of_states, of_weight
        ctx.mark_non_differentiable(divergence)
        if soft is not None:
            total = total + soft.weight * soft.temperature**2 * divergence
        return total, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, _ = grads
        of_states, of_weight = ctx.held
        scaled = [None if one is None else one * grad.to(one.dtype) for one in (of_states, of_weight)]
        return scaled[0], scaled[1], None, None, None, None


def _pull(ours: Tensor, theirs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sum of KL(theirs || ours) over rows of logits at a temperature, and p_ours - p_theirs: its gradient times T."""
    ours, theirs = (ours / temperature).log_softmax(dim=1), (theirs / temperature).log_softmax(dim=1)
    wanted = theirs.exp()
    apart = (wanted * theirs.sub_(ours)).sum()
    return apart, ours.exp_().sub_(wanted)
