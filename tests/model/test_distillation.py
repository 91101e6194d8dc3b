"""Distillation equals its slow, obvious form: every logit at once, torch's own KL, autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from voco.model import lm_head
from voco.model.batch import Batch, collate, with_teacher
from voco.model.lm_head import DistillTarget, LMHead
from voco.model.voco_llama import Distillation, VocoLlama
from voco.sequence.sequence import Layout, build_sample

ROWS, WIDTH, WORDS = 11, 8, 37


@pytest.mark.parametrize("chunk", [1, 4 * WORDS, 1 << 24], ids=["a row a chunk", "four rows", "one chunk"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("own", [True, False], ids=["own head", "teacher's head"])
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, temperature: float, own: bool) -> None:
    monkeypatch.setattr(lm_head, "LOGITS", chunk)
    torch.manual_seed(0)
    head = LMHead(nn.Linear(WIDTH, WORDS, bias=False).double())
    states = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(WORDS, (ROWS,))
    teacher_states = torch.randn(ROWS, WIDTH if own else 5, dtype=torch.float64) * 2
    weight = None if own else torch.randn(WORDS, 5, dtype=torch.float64)
    fast_results, slow = [], []
    for strength in (0.0, 0.7):
        total, divergence = head(states, targets, DistillTarget(teacher_states, weight, strength, temperature))
        assert not divergence.requires_grad
        fast_results.append((total, divergence, *torch.autograd.grad(3.0 * total, (states, head.weight))))
        logits = states @ head.weight.t()
        teacher_log = (teacher_states @ (head.weight.detach() if own else weight).t() / temperature).log_softmax(1)  # type: ignore[union-attr]
        kl = F.kl_div((logits / temperature).log_softmax(1), teacher_log, log_target=True, reduction="sum")
        obvious = F.cross_entropy(logits, targets, reduction="sum") + strength * temperature**2 * kl
        slow.append((obvious, kl, *torch.autograd.grad(3.0 * obvious, (states, head.weight))))
    for fast, expected in zip(fast_results, slow, strict=True):
        assert all(tiny.close(value, reference) for value, reference in zip(fast, expected, strict=True))
    hard = head(states, targets)
    assert torch.equal(fast_results[0][0], hard), "weight 0 is no distillation"
    assert tiny.close(fast_results[0][2], torch.autograd.grad(3.0 * hard, states)[0])
    assert (fast_results[1][2] - fast_results[0][2]).abs().max() > 1e-2


def batch_of(layout: Layout, talks: int = 2) -> Batch:
    features = tiny.features(3)
    store = {str(number): view for number, view in enumerate(features)}
    turns = [tiny.question("which one?", "the left"), tiny.question("why?", "it is so")][:talks]
    samples = [
        build_sample("a", turns, ["0", "1"], tiny.TOKENIZER, layout),
        build_sample("b", turns[:1], ["2"], tiny.TOKENIZER, layout),
    ]
    samples.append(build_sample("c", turns[:1], [], tiny.TOKENIZER, layout))
    return collate(samples, store.__getitem__, (tiny.VISION_SLOTS, tiny.FEATURES))


def model_losses(model: VocoLlama, teacher: VocoLlama, strength: float, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The obvious form: two complete models, all logits; the teacher is another model, of method none."""
    batch, teacher_batch = batch_of(model.layout), batch_of(teacher.layout)
    logits = model.logits(batch)[0, batch.predict_at]
    with torch.no_grad():
        teacher_log = (teacher.logits(teacher_batch)[0, teacher_batch.predict_at] / temperature).log_softmax(1)
    kl = F.kl_div((logits / temperature).log_softmax(1), teacher_log, log_target=True, reduction="sum")
    return F.cross_entropy(logits, batch.predict_id, reduction="sum") + strength * temperature**2 * kl, kl


@pytest.mark.parametrize("method", ["itself", "voco", "avg_pool", "q_former"])
def test_a_model_learns_as_two_complete_models_would(method: str) -> None:
    model = tiny.model("voco" if method == "itself" else method, 1)
    teacher = tiny.model("none", 1, seed=0 if method == "itself" else 4)
    if method == "itself":
        teacher.load_state_dict(model.state_dict())
    expected, kl = model_losses(model, teacher, 0.7, 2.0)
    expected.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.distillation = Distillation(0.7, 2.0, None if method == "itself" else teacher)
    total, divergence = model(with_teacher(batch_of(model.layout), batch_of(teacher.layout)).to("cpu", torch.float64))
    assert tiny.close(total, expected)
    assert tiny.close(divergence, kl)
    assert kl > 1e-2
    total.backward()
    assert all(tiny.close(weight.grad, grads[name]) for name, weight in model.named_parameters() if grads[name] is not None)
    assert all(weight.grad is None for weight in teacher.parameters())
    assert len(dict(model.named_parameters())) == len(grads), "the teacher is not one of the model's modules"


def test_other_predictions_are_an_error() -> None:
    batch = batch_of(tiny.layout("voco", 1))
    with pytest.raises(ValueError, match="do not predict the same tokens in samples a, b, c"):
        with_teacher(batch, batch_of(tiny.layout("none", 1), talks=1))
    assert with_teacher(batch, replace(batch)).teacher is not None
