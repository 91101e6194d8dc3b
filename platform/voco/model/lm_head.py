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
    """A teacher's states for S predictions, and their weight: CE + weight x T^2 x KL(teacher || student), both at T.

    Hinton et al., arXiv 1503.02531, section 2: T^2 keeps the gradient's size when T changes.
    """

    states: Tensor  # (S, teacher's width)
    head: Tensor | None  # (vocabulary, teacher's width); None: the student's own
    weight: float
    temperature: float


class LMHead(nn.Linear):
    """Replaces transformers' output head and shares its weight: logits of states, or the summed loss of states and targets.

    One module for both, because under ZeRO-3 a weight is complete only inside the module that owns it.
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

        With `soft` also the distillation is in that sum, and the sum of the divergences is returned, which has no gradient.
        """
        if targets is None:
            return F.linear(states, self.weight)
        needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (states, self.weight)]
        total, divergence = SummedCrossEntropy.apply(states, self.weight, targets, *needs, soft)  # type: ignore[no-untyped-call]
        return total if soft is None else (total, divergence)


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy, and of the distillation if there is one, chunk by chunk; and the sum of the divergences.

    Both gradients are computed in the forward pass, while the logits are in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        needs_states: bool,
        needs_weight: bool,
        soft: DistillTarget | None,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.float64 if states.dtype == torch.float64 else torch.float32
        states_grad = torch.empty_like(states) if needs_states else None
        weight_grad = torch.zeros_like(weight) if needs_weight else None
        total, divergence = (torch.zeros((), dtype=exact, device=states.device) for _ in range(2))
        rows = max(1, LOGITS // len(weight))
        for start in range(0, len(states), rows):
            chunk, ids = states[start : start + rows], targets[start : start + rows, None]
            logits = (chunk @ weight.t()).to(exact)
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            total += (log_sum - logits.gather(1, ids)).sum()
            kl_slope: Tensor | None = None
            if soft is not None:
                teacher = soft.states[start : start + rows] @ (weight if soft.head is None else soft.head).t()
                kl, kl_slope = _kl_and_slope(logits, teacher.to(exact), soft.temperature)
                divergence += kl
            if states_grad is None and weight_grad is None:
                continue
            logits.sub_(log_sum).exp_()
            logits.scatter_add_(1, ids, torch.full_like(log_sum, -1.0))
            if soft is not None and kl_slope is not None:
                logits.add_(kl_slope, alpha=soft.weight * soft.temperature)  # T^2, and 1/T of the logits' own scale
            slope = logits.to(states.dtype)
            if states_grad is not None:
                torch.mm(slope, weight, out=states_grad[start : start + rows])
            if weight_grad is not None:
                weight_grad.addmm_(slope.t(), chunk)
        ctx.gradients = states_grad, weight_grad
        ctx.mark_non_differentiable(divergence)
        if soft is not None:
            total = total + soft.weight * soft.temperature**2 * divergence
        return total, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, _ = grads
        scaled = [None if gradient is None else gradient * grad.to(gradient.dtype) for gradient in ctx.gradients]
        return scaled[0], scaled[1], None, None, None, None


def _kl_and_slope(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sum of KL(teacher || student) over rows of logits at a temperature, and p_student - p_teacher: its gradient times T."""
    log_student, log_teacher = ((logits / temperature).log_softmax(dim=1) for logits in (student, teacher))
    target = log_teacher.exp()
    kl = (target * log_teacher.sub_(log_student)).sum()
    return kl, log_student.exp_().sub_(target)
