"""Text that reads caches in training (pass 2 alone) equals the one masked pass, whether or not the model is the compressor."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from talks import cached, caches_of, one_pass, talking_samples

from voco.model.cache import join_caches
from voco.model.kv_capture import capture_keys_values
from voco.sequence.sequence import TEXT


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_reading_caches_equals_one_masked_pass_over_all_frames(tokens: int) -> None:
    model = tiny.model(tokens=tokens)
    samples, store, by_sample = talking_samples(model)
    masked, text = one_pass(model, samples, store), cached(model, samples, caches_of(model, by_sample))
    assert tiny.close(model.hidden_cached(text)[0], model.hidden(masked)[masked.kind == TEXT])
    assert tiny.close(model(text), model(masked))
    assert text.predict_id.tolist() == masked.predict_id.tolist()


def test_swapped_frames_move_the_states() -> None:
    """The equality above would fail: swapping two frames' caches moves the states by more than 1e-2."""
    model = tiny.model(tokens=2)
    samples, _, by_sample = talking_samples(model)
    caches = caches_of(model, by_sample)
    right = model.hidden_cached(cached(model, samples, caches))
    swapped = [caches_of(model, [views[::-1]])[0] for views in by_sample]
    wrong = model.hidden_cached(cached(model, samples, swapped))
    first = len(cached(model, samples[:1], caches[:1]).text.ids[0])
    assert (right[0, :first] - wrong[0, :first]).abs().max() > 1e-2


def test_another_compressor_equals_one_pass_with_its_keys_and_values() -> None:
    """The slow form: one masked pass of the reader over the complete sequence, with the prefix keys and values of every layer

    replaced by those of one masked pass of the compressor.
    """
    compressor, reader = tiny.model(tokens=2, seed=0), tiny.model(tokens=2, seed=5)
    reader.compressor = compressor.compressor
    samples, store, by_sample = talking_samples(compressor)
    masked = one_pass(reader, samples, store)
    with capture_keys_values(compressor.language_model.model.layers, 8) as compressor_states:
        compressor.hidden(masked)
    prefix = masked.view >= 0
    handles = []
    for layer, (keys, values) in zip(reader.language_model.model.layers, compressor_states, strict=True):
        for module, states in ((layer.self_attn.k_proj, keys), (layer.self_attn.v_proj, values)):
            flat = states.flatten(1)[None]

            def put(_module: Any, _inputs: Any, output: torch.Tensor, flat: torch.Tensor = flat) -> torch.Tensor:
                return torch.where(prefix[:, :, None], flat, output)

            handles.append(module.register_forward_hook(put))
    # by the complete pass, whose last layer has the prefix too
    expected = reader.language_model.lm_head(reader.hidden(masked)[0, masked.predict_at], masked.predict_id)
    for handle in handles:
        handle.remove()
    caches = caches_of(compressor, by_sample)
    assert tiny.close(reader(cached(reader, samples, caches)), expected)
    assert not tiny.close(reader(masked), expected), "the two models must differ, or the test proves nothing"


def test_gradients_reach_every_layer_of_the_reader_and_no_cache() -> None:
    model = tiny.model(tokens=2)
    samples, _, by_sample = talking_samples(model)
    caches = caches_of(model, by_sample)
    model(cached(model, samples, caches)).backward()
    for name, weight in model.language_model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name
    assert all(weight.grad is None for weight in model.projector.parameters())
    assert all(not cache.keys.requires_grad for cache in caches if cache is not None)


def test_fewer_tokens_of_a_cache_are_read_as_the_same_model_would_make_them() -> None:
    model = tiny.model(tokens=4)
    samples, store, by_sample = talking_samples(model)
    caches = [None if cache is None else cache.take(2) for cache in caches_of(model, by_sample)]
    model.layout = model.layout.model_copy(update={"tokens": 2})
    assert tiny.close(model(cached(model, samples, caches)), model(one_pass(model, samples, store)))


def test_an_answer_that_could_pass_the_last_position_is_refused() -> None:
    model = tiny.model(tokens=2, max_position_embeddings=40)
    (cache,) = caches_of(model, [tiny.features(3)])
    prompt = list(range(10))
    start = model.layout.prefix_length + 6
    assert len(model.answer_ids([cache], [prompt], 40 - start - 10)) == 1
    with pytest.raises(ValueError, match=f"{start} positions of views, a prompt of 10 tokens.*the model's 40 positions"):
        model.answer_ids([cache], [prompt], 41 - start - 10)


def test_a_cache_of_another_compressor_is_refused() -> None:
    model, other = tiny.model(tokens=2), tiny.model(tokens=2)
    other.compressor = "another"
    samples, _, by_sample = talking_samples(model)
    with pytest.raises(ValueError, match="this cache was made by"):
        model(cached(model, samples, caches_of(other, by_sample)))
    with pytest.raises(ValueError, match="cannot be joined"):
        join_caches([caches_of(reading_model, by_sample)[0] for reading_model in (model, other)])  # type: ignore[list-item]


def test_recomputed_activations_give_the_same_gradients() -> None:
    plain, recomputed = tiny.model(tokens=2), tiny.model(tokens=2)
    recomputed.language_model.train()
    recomputed.language_model.activation_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    recomputed.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    losses = []
    for model in (plain, recomputed):
        samples, store, _ = talking_samples(model)
        loss = model(one_pass(model, samples, store))
        loss.backward()
        losses.append(loss)
    assert len(calls) == 2, "the first layer ran once forward and once again for the backward pass"
    assert tiny.close(losses[1], losses[0])
    plain_weights = dict(plain.named_parameters())
    for name, weight in recomputed.named_parameters():
        assert weight.grad is not None, name
        assert tiny.close(weight.grad, plain_weights[name].grad if plain_weights[name].grad is not None else torch.zeros(())), (
            name
        )
