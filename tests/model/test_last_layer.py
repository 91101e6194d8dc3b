"""The last layer run on the rows that something reads equals the complete pass, values and gradients, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from talks import cached, caches_of, one_pass, talking_samples
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from voco.model.batch import collate
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import TEXT, VOCO, filler_sample

FAMILIES = {
    "llama": None,
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}


def family_model(family: str, method: str) -> VocoLlama:
    if FAMILIES[family] is None:
        return tiny.model(method)
    network, config = FAMILIES[family]  # type: ignore[misc]
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    language_model = network(config(**sizes, **heads)).double()
    with torch.no_grad():
        for name, weight in language_model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(12.0 if "q_proj" in name or "k_proj" in name else 4.0)
    model = VocoLlama(language_model, tiny.layout(method), tiny.FEATURES, tokenizer=tiny.TOKENIZER).double().eval()
    model.compressor = "tiny"
    return model


def gradients(model: VocoLlama, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("method", ["voco", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_complete_pass(family: str, method: str) -> None:
    model = family_model(family, method)
    samples, store, _ = talking_samples(model)
    batch = one_pass(model, samples, store)
    assert 0 < len(batch.predict_at) < batch.ids.shape[1] / 4
    complete = model.hidden(batch)[0]
    assert tiny.close(model.hidden(batch, rows=batch.predict_at), complete[batch.predict_at])
    slow: Any = model.language_model.lm_head(complete[batch.predict_at], batch.predict_id)
    fast: Any = model(batch)
    assert tiny.close(fast, slow)
    fast_grads, slow_grads = gradients(model, fast), gradients(model, slow)
    assert fast_grads.keys() == slow_grads.keys()
    assert all(tiny.close(fast_grads[name], slow_grads[name]) for name in slow_grads)


def test_pass_over_caches_equals_the_complete_pass() -> None:
    model = tiny.model()
    samples, _, by_sample = talking_samples(model)
    text = cached(model, samples, caches_of(model, by_sample))
    rows = text.text.predict_at
    assert tiny.close(model.hidden_cached(text, rows=rows), model.hidden_cached(text)[0, rows])


def test_the_last_layer_sees_only_the_rows_that_predict_and_what_they_read() -> None:
    model = tiny.model()
    samples, store, _ = talking_samples(model)
    batch = one_pass(model, samples, store)
    inputs: list[torch.Size] = []
    layers = model.language_model.model.layers
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0].shape[:-1]))
    projected: dict[str, int] = {}
    for name, module in layers[-1].self_attn.named_children():
        module.register_forward_pre_hook(lambda _module, arguments, name=name: projected.update({name: len(arguments[0])}))
    model(batch)
    length, kind = batch.ids.shape[1], batch.kind[0]
    assert inputs == [(1, length), (1, length), (len(batch.predict_at),)]
    answers, read = len(batch.predict_at), int(((kind == TEXT) | (kind == VOCO)).sum())
    assert projected["o_proj"] == answers
    assert answers <= projected["q_proj"] < int((kind == TEXT).sum())
    assert projected["q_proj"] < projected["k_proj"] == projected["v_proj"] <= read < length
    inputs.clear()
    prompts = [[1, 2, 3], [4, 5]]
    next(model.decode_steps([None, None], prompts))
    assert inputs == [(2, 3), (2, 3), (2,)]


def test_a_batch_that_predicts_nothing_has_no_loss_and_reaches_every_weight() -> None:
    model = tiny.model()
    samples, store, _ = talking_samples(model)
    nothing = collate([filler_sample(model.layout)], store.__getitem__, (tiny.VISION_SLOTS, tiny.FEATURES))
    total: Any = model(nothing.to("cpu", model.dtype))
    assert float(total.detach()) == 0.0
    grads = gradients(model, total)
    assert grads.keys() == gradients(model, model(one_pass(model, samples, store))).keys()
    assert all(bool((grad == 0).all()) for grad in grads.values())
