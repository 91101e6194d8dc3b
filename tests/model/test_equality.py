"""Compressing views and then reading text against the cached keys and values equals the one masked pass."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from voco.model.batch import collate
from voco.model.cache import join_caches
from voco.sequence.sequence import TEXT, TokenSample, build_sample


def one_pass_logits(model, samples, features):
    """Logits of each sample's text tokens, by sample and conversation, from the one masked pass."""
    store = {name: f for s, fs in zip(samples, features, strict=True) for name, f in zip(s.media, fs, strict=True)}
    batch = collate(samples, store.__getitem__, (tiny.VISION_SLOTS, tiny.FEATURES))
    logits = model.logits(batch.to("cpu", model.dtype))
    return {
        (index, c): logits[(batch.sample == index) & (batch.kind == TEXT) & (batch.conversation == c)]
        for index, sample in enumerate(samples)
        for c in sorted(set(sample.conversation[sample.kinds == TEXT].tolist()))
    }


def make(model, views, texts, name, counts=None):
    media = [f"{name}-{v}" for v in range(views)]
    return build_sample(name, [tiny.question(t) for t in texts], media, tiny.TOKENIZER, model.layout, voco_tokens=counts)


def greedy_one_pass(model, sample, features, steps):
    """The slow, obvious form: the complete masked pass again for every new token."""
    out = []
    for _ in range(steps):
        logits = one_pass_logits(model, [sample], [features])[(0, 0)][-1:]
        token = int(model.choose(logits.clone())[0])
        out.append(token)
        add = {"ids": token, "kinds": TEXT, "view": -1, "conversation": 0, "position": int(sample.position[-1]) + 1}
        arrays = {
            key: torch.cat([torch.from_numpy(getattr(sample, key)), torch.tensor([value])]).numpy() for key, value in add.items()
        }
        sample = TokenSample(
            sample.sample_id, predict_at=sample.predict_at, predict_id=sample.predict_id, media=sample.media, cut=0, **arrays
        )
    return out


def read_logits(model, cache, prompt):
    """Logits of every prompt token read against a cache: of the last token of every beginning of the prompt."""
    states = [model._prefill([cache], [prompt[:length]])[0] for length in range(1, len(prompt) + 1)]
    return model.language_model.lm_head(torch.cat(states))


def sensitive(model, sample, features):
    """A wrong mask and a position off by one must move the logits, or equality proves nothing."""
    right = one_pass_logits(model, [sample], [features])[(0, 0)]
    leaky = type(model)(model.language_model, model.layout.model_copy(update={"method": "none"}), tiny.FEATURES)
    leaky.projector = model.projector
    assert (one_pass_logits(leaky, [sample], [features])[(0, 0)] - right).abs().max() > 1e-2
    moved = sample.position + (sample.kinds == TEXT)
    shifted = TokenSample(**{**sample.__dict__, "position": moved})
    assert (one_pass_logits(model, [shifted], [features])[(0, 0)] - right).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_compress_then_read_equals_one_pass(tokens, dtype):
    model = tiny.model("voco", tokens, dtype)
    features = tiny.features(1, dtype=dtype)
    sample = make(model, 1, ["what is it?"], "a")
    sensitive(model, sample, features)
    (cache,) = model.compress_features([features])
    assert cache.keys.shape == (3, 2, tokens, 8)
    prompt = sample.ids[sample.kinds == TEXT].tolist()
    expected = one_pass_logits(model, [sample], [features])[(0, 0)]
    assert tiny.close(read_logits(model, cache, prompt), expected)
    assert model.answer_ids([cache], [prompt], 12)[0][:12] == _until_eos(model, greedy_one_pass(model, sample, features, 12))


def _until_eos(model, ids):
    return list(itertools.takewhile(lambda token: token != model.layout.eos_id, ids))


@pytest.mark.parametrize("views", [0, 1, 2, 7, 64])
def test_many_views_joined_equal_one_pass(views):
    model = tiny.model("voco", 2)
    features = tiny.features(views)
    sample = make(model, views, ["in which order?"], "v")
    prompt = sample.ids[sample.kinds == TEXT].tolist()
    cache = join_caches([model.compress_features([[f]])[0] for f in features]) if views else None
    expected = one_pass_logits(model, [sample], [features])[(0, 0)]
    assert tiny.close(read_logits(model, cache, prompt), expected)
    assert model.answer_ids([cache], [prompt], 10)[0] == _until_eos(model, greedy_one_pass(model, sample, features, 10))


def test_a_different_number_of_tokens_per_view():
    model = tiny.model("voco", 2)
    features, counts = tiny.features(4), [3, 1, 8, 2]
    sample = make(model, 4, ["what?"], "m", counts)
    (cache,) = model.compress_features([features], tokens=counts)
    assert cache.tokens == (3, 1, 8, 2)
    expected = one_pass_logits(model, [sample], [features])[(0, 0)]
    assert tiny.close(read_logits(model, cache, sample.ids[sample.kinds == TEXT].tolist()), expected)


def test_reading_fewer_tokens_equals_a_compression_of_fewer():
    model = tiny.model("voco", 8)
    features = tiny.features(3)
    (cache,) = model.compress_features([features])
    sample = make(model, 3, ["how many?"], "n", [2, 2, 2])
    expected = one_pass_logits(model, [sample], [features])[(0, 0)]
    assert tiny.close(read_logits(model, cache.take(2), sample.ids[sample.kinds == TEXT].tolist()), expected)
    with pytest.raises(ValueError, match="cannot read 9"):
        cache.take(9)


@pytest.mark.parametrize("method", ["voco", "none", "avg_pool", "q_former"])
def test_a_mixed_batch_equals_each_sample_alone_in_every_order(method):
    model = tiny.model(method, 1)
    shapes = [(1, ["what is this?", "why?"]), (0, ["hello there, you"]), (2, ["left or right of it?"]), (0, ["a", "bb"])]
    features = [tiny.features(views, seed=index) for index, (views, _) in enumerate(shapes)]
    samples = [make(model, views, texts, f"s{index}") for index, (views, texts) in enumerate(shapes)]
    alone = [one_pass_logits(model, [sample], [f]) for sample, f in zip(samples, features, strict=True)]
    for order in itertools.permutations(range(4)):
        together = one_pass_logits(model, [samples[i] for i in order], [features[i] for i in order])
        for number, index in enumerate(order):
            for conversation in range(len(shapes[index][1])):
                assert tiny.close(together[(number, conversation)], alone[index][(0, conversation)])


@pytest.mark.parametrize("method", ["voco", "none", "avg_pool", "q_former"])
def test_batched_decoding_from_caches_equals_one_by_one(method):
    model = tiny.model(method, 2 if method == "voco" else 1)
    shapes = [(1, "what is this thing?"), (0, "hi"), (3, "order?"), (1, "a much longer question than the others?")]
    features = [tiny.features(views, seed=index) for index, (views, _) in enumerate(shapes)]
    samples = [make(model, views, [text], f"s{index}") for index, (views, text) in enumerate(shapes)]
    caches = [model.compress_features([f])[0] if f else None for f in features]
    prompts = [sample.ids[sample.kinds == TEXT].tolist() for sample in samples]
    together = model.answer_ids(caches, prompts, 12)
    for index, sample in enumerate(samples):
        assert together[index] == _until_eos(model, greedy_one_pass(model, sample, features[index], 12))


def test_conversations_do_not_see_each_other():
    model = tiny.model("voco", 1)
    features = tiny.features(1)
    both = one_pass_logits(model, [make(model, 1, ["what is it?", "where?"], "x")], [features])
    other = one_pass_logits(model, [make(model, 1, ["something else", "where?"], "x")], [features])
    assert torch.equal(both[(0, 1)], other[(0, 1)]) or tiny.close(both[(0, 1)], other[(0, 1)])
    alone = one_pass_logits(model, [make(model, 1, ["where?"], "x")], [features])
    assert tiny.close(both[(0, 1)], alone[(0, 0)])


def test_permuting_views_changes_the_logits():
    model = tiny.model("voco", 1)
    features = tiny.features(3)
    sample = make(model, 3, ["which came first?"], "p")
    right = one_pass_logits(model, [sample], [features])[(0, 0)]
    assert (one_pass_logits(model, [sample], [features[::-1]])[(0, 0)] - right).abs().max() > 1e-2


@pytest.mark.parametrize("views", [1, 3])
def test_full_caching_equals_one_pass(views):
    """Method none caches the entire prefix: text that reads it has the logits of one plain causal pass."""
    model = tiny.model("none", 1)
    features = tiny.features(views)
    sample = make(model, views, ["what is it?"], "f")
    (cache,) = model.compress_features([features])
    assert cache.tokens == (model.layout.prefix_length + 1,) * views
    expected = one_pass_logits(model, [sample], [features])[(0, 0)]
    assert tiny.close(read_logits(model, cache, sample.ids[sample.kinds == TEXT].tolist()), expected)


def test_every_n_of_one_compression_equals_a_compression_to_n():
    model = tiny.model("voco", 4)
    features = tiny.features(3)
    (cache,) = model.compress_features([features])
    prompt = make(model, 3, ["how many?"], "e").ids[-12:].tolist()
    logits = {}
    for n in (1, 2, 4):
        (own,) = model.compress_features([features], tokens=[n] * 3)
        logits[n] = read_logits(model, own, prompt)
        assert tiny.close(read_logits(model, cache.take(n), prompt), logits[n])
    assert (logits[1] - logits[2]).abs().max() > 1e-2
    assert (logits[2] - logits[4]).abs().max() > 1e-2
