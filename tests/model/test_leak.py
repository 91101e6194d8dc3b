"""The image reaches the text through the VoCo rows only; errors for what would break that."""

from __future__ import annotations

import pytest
import tiny
import torch

from voco.model.attention.plan import check_backend
from voco.model.batch import collate
from voco.model.kv_capture import capture_keys_values
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import TEXT, VOCO, build_sample


def setup(method="voco"):
    model = tiny.model(method, 2)
    sample = build_sample("a", [tiny.question("what is it?", "a cat")], ["i"], tiny.TOKENIZER, model.layout)
    return model, sample


def batch_of(model, sample, features):
    return collate([sample], lambda _: features, (9, 6))


def text_logits_with_frozen_voco(model, sample, features, frozen):
    """Text logits when keys and values of the VoCo rows are replaced by `frozen` ones in every layer."""
    batch = batch_of(model, sample, features)
    rows = batch.kind[0] == VOCO
    handles = []
    for layer, (keys, values) in zip(model.language_model.model.layers, frozen, strict=True):
        for module, state in ((layer.self_attn.k_proj, keys), (layer.self_attn.v_proj, values)):

            def freeze(_m, _i, output, state=state):
                output = output.clone()
                output[:, rows] = state
                return output

            handles.append(module.register_forward_hook(freeze))
    logits = model.logits(batch)[batch.kind == TEXT]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize(("method", "leaks"), [("voco", False), ("none", True)])
def test_with_voco_states_frozen_pixels_change_no_text_logit(method, leaks):
    model, sample = setup(method)
    first, second = tiny.features(2)
    batch = batch_of(model, sample, first)
    rows = torch.nonzero(batch.kind[0] == VOCO)[:, 0]
    with capture_keys_values(model.language_model.model.layers, 8, rows) as states:
        model.hidden(batch)
    frozen = [(keys.flatten(1), values.flatten(1)) for keys, values in states]
    first_logits = text_logits_with_frozen_voco(model, sample, first, frozen)
    second_logits = text_logits_with_frozen_voco(model, sample, second, frozen)
    assert torch.equal(first_logits, second_logits) is not leaks
    assert not leaks or (first_logits - second_logits).abs().max() > 1e-2  # the same test detects a leak


def test_gradient_reaches_vision_through_voco_rows_only():
    model, sample = setup()
    features = tiny.features(1)[0].requires_grad_()
    model(batch_of(model, sample, features)).backward()
    assert features.grad is not None
    assert features.grad.abs().max() > 0
    detached = tiny.features(1)[0].requires_grad_()
    handles = []
    batch = batch_of(model, sample, detached)
    rows = batch.kind[0] == VOCO
    for layer in model.language_model.model.layers:
        for module in (layer.self_attn.k_proj, layer.self_attn.v_proj):

            def detach(_m, _i, output):
                return torch.where(rows[None, :, None], output.detach(), output)

            handles.append(module.register_forward_hook(detach))
    model.hidden(batch)[0, batch.predict_at].square().sum().backward()  # without `rows`, so that every layer has all rows
    assert detached.grad is None or detached.grad.abs().max() == 0


def test_attention_that_cannot_honour_the_mask_is_refused():
    with pytest.raises(ValueError, match="cannot honour the mask exactly"):
        check_backend("flash_attention_2")
    with pytest.raises(ValueError, match="needs a plan"):
        tiny.model().language_model(torch.tensor([[1, 2, 3]]))
    dropping, sample = tiny.model(attention_dropout=0.1).train(), setup()[1]
    with pytest.raises(ValueError, match="attention with dropout"):
        dropping(batch_of(dropping, sample, tiny.features(1)[0]))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
            check_backend("varlen")


def test_models_that_cannot_keep_a_cache_are_refused():
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="changes with the sequence"):
        VocoLlama(tiny.llama(rope_parameters=dynamic), tiny.layout(), tiny.FEATURES)


def test_voco_is_never_generated():
    model = tiny.model("voco", 1)
    with torch.no_grad():
        model.language_model.lm_head.weight[model.layout.voco_id] = 1e3
        model.language_model.lm_head.weight[-1] = -1e3
    (cache,) = model.compress_features([tiny.features(1)])
    for ids in model.answer_ids([cache, None], [[5, 6], [7]], 20):
        assert not {model.layout.voco_id, model.layout.image_id, model.layout.pad_id} & set(ids)


def test_a_cache_of_another_compressor_is_refused():
    model = tiny.model("voco", 1)
    (cache,) = model.compress_features([tiny.features(1)])
    model.compressor = "another"
    with pytest.raises(ValueError, match="was made by"):
        model.answer_ids([cache], [[5]], 2)


def test_every_pass_runs_under_our_plan():
    """Without a mask transformers takes restarting positions for packed samples; our attention function ignores its masks."""
    model, _ = setup()
    first, *_, last = model.language_model.model.layers
    plans = {first: [], last: []}
    for layer, seen in plans.items():
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _inputs, options, seen=seen: seen.append(type(options["plan"]).__name__), with_kwargs=True
        )
    caches = model.compress_features([tiny.features(3)])
    model.answer_ids(caches, [[5, 6]], 3)
    assert plans[first] == ["SegmentsPlan", "SegmentsPlan", "DensePlan", "DensePlan"]
    assert plans[last] == ["SegmentsPlan", "DensePlan", "DensePlan"]  # compressing ends before it
