"""Compiled layers give the loss and the gradients of the layers as they are, for rows of any length."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from talks import one_pass, talking_samples
from transformers import AttentionInterface

from voco.model.attention.plan import NAME, attend
from voco.model.compiled_layers import compile_layers
from voco.model.voco_llama import VocoLlama


@pytest.fixture(autouse=True)
def eager_attention() -> Iterator[None]:
    yield
    AttentionInterface.register(NAME, attend)
    torch._dynamo.reset()


def loss_and_gradients(model: VocoLlama, count: int) -> dict[str, torch.Tensor]:
    samples, store, _ = talking_samples(model)
    model.zero_grad()
    total = model(one_pass(model, samples[:count], store).to("cpu", model.dtype))
    total.backward()
    return {"loss": total.detach()} | {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_losses_and_gradients_are_those_of_eager_layers(recomputed: bool) -> None:
    model = tiny.model("voco", dtype=torch.float32)
    model.language_model.train()
    samples, _, _ = talking_samples(model)
    expected = [loss_and_gradients(model, count) for count in range(1, len(samples) + 1)]
    if recomputed:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    compile_layers(model.language_model.model)
    torch._dynamo.utils.counters.clear()
    for eager in expected:
        got = loss_and_gradients(model, len(samples) if eager is expected[-1] else expected.index(eager) + 1)
        for name, value in eager.items():
            scale = max(1.0, float(value.abs().max()))
            assert float((got[name] - value).abs().max()) <= 2e-6 * scale, name
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 16, "equal layers and other lengths share what was compiled"
