"""Sampling, stop strings and streaming: which token is chosen, and how an answer ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from model import llava_world

import voco.model
from voco.errors import Refused
from voco.job.config import Model, Text
from voco.job.load import build_job
from voco.model import build, weights
from voco.model.cache import join_caches
from voco.model.generation import prompt_ids, shared_prompt_ids
from voco.model.sampling import Answer, Sampling, collect_answers
from voco.train.initial_model import initial_model


def prompts_of(model, texts):
    return [prompt_ids([{"role": "user", "text": text}], model.tokenizer, model.layout, True) for text in texts]


def caches_of(model, count):
    return [model.compress_features([tiny.features(1, seed=seed)])[0] for seed in range(count)]


def drawn(model, caches, prompts, sampling, new=6):
    (*_, answers) = model.stream_answers(caches, prompts, new, sampling)
    return [answer.ids for answer in answers]


def test_draws_follow_the_truncated_probabilities():
    """The frequencies of ten thousand draws are the softmax at this temperature, over what top_k and top_p leave."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.9, seed=3)
    (generator,) = sampling.generators(1)
    counts = (
        torch.bincount(torch.cat([sampling.choose(logits.clone(), [generator]) for _ in range(10_000)]), minlength=5) / 10_000
    )
    shares = (logits[0] / 0.7).softmax(-1)
    shares[4] = 0.0  # top_k
    shares /= shares.sum()
    reachable = shares.cumsum(-1) - shares < 0.9  # sorted already: the likeliest until 0.9 is reached
    expected = torch.where(reachable, shares, 0.0)
    expected /= expected.sum()
    assert not reachable.all()
    assert torch.allclose(counts, expected, atol=0.02)
    assert counts[~reachable].sum() == 0


def test_the_same_seed_draws_the_same_in_any_batch():
    model = tiny.model("voco", 2)
    caches, prompts = caches_of(model, 3), prompts_of(model, ["what is it?", "which color is this thing?", "no"])
    sampling = Sampling(temperature=1.5, seed=11)
    together = drawn(model, caches, prompts, sampling)
    alone = [drawn(model, [cache], [prompt], sampling)[0] for cache, prompt in zip(caches, prompts, strict=True)]
    assert together == alone
    assert together == drawn(model, caches, prompts, sampling)
    assert together != drawn(model, caches, prompts, Sampling(temperature=1.5, seed=12))


def test_top_k_of_one_is_greedy():
    model = tiny.model("voco", 2)
    caches, prompts = caches_of(model, 2), prompts_of(model, ["what is it?", "where is this?"])
    assert drawn(model, caches, prompts, Sampling(temperature=5.0, top_k=1)) == model.answer_ids(caches, prompts, 6)


def test_forbidden_tokens_are_never_drawn():
    model = tiny.model("voco", 2)
    with torch.no_grad():
        model.language_model.lm_head.weight[model.layout.voco_id] = 50.0
    ids = drawn(model, caches_of(model, 1), prompts_of(model, ["what?"]), Sampling(temperature=100.0, seed=1), 200)[0]
    assert len(ids) > 20
    assert not {model.layout.voco_id, model.layout.image_id, model.layout.pad_id} & set(ids)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected temperature"):
        Sampling(**wrong)


class Letters:
    """A tokenizer that decodes ids as UTF-8 bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


def generate_answer(text, stop=(), max_new_tokens=100):
    """An answer of these bytes and an end token, and its pieces."""
    answer = Answer(Letters(), 0, tuple(stop))
    pieces = []
    for number, token in enumerate([*text.encode(), 0]):
        answer.add(token, number + 1 >= max_new_tokens)
        pieces.append(answer.piece())
        if answer.ended:
            break
    return answer, pieces


@pytest.mark.parametrize("stop", [("STOP",), ("OP", "STO"), ("x", "P end")])
def test_nothing_of_a_stop_string_is_shown(stop):
    text = "a STone, S and STOP end of it"
    answer, pieces = generate_answer(text, stop)
    expected = text[: min(index for index in (text.find(string) for string in stop) if index >= 0)]
    assert answer.ended == "stop string"
    assert answer.text == "".join(pieces) == expected


def test_the_beginning_of_a_stop_string_is_shown_at_the_end():
    answer, pieces = generate_answer("a STO", ["STOP"])
    assert answer.ended == "end token"
    assert "".join(pieces) == answer.text == "a STO"
    assert pieces[-1] == "STO"


def test_only_complete_characters_are_shown():
    answer, pieces = generate_answer("n\u00e9 \U0001f600!")
    assert "".join(pieces) == answer.text == "n\u00e9 \U0001f600!"
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_answer_ends_at_its_length():
    answer, _ = generate_answer("abcdef", max_new_tokens=3)
    assert (answer.text, answer.ended) == ("abc", "length")


def test_streamed_pieces_are_the_complete_answer():
    model = tiny.model("voco", 2)
    (cache,) = caches_of(model, 1)
    pieces = list(model.stream(cache, "what is it?", 12))
    (ids,) = model.answer_ids([cache], prompts_of(model, ["what is it?"]), 12)
    assert "".join(pieces) == model.tokenizer.decode(ids, skip_special_tokens=True)
    assert model.generate(cache, "what is it?", 12) == "".join(pieces).strip()


def test_several_images_and_turns_in_one_prompt():
    model = tiny.model("voco", 2)
    caches = caches_of(model, 3)
    turns = [{"role": "user", "text": "what is it?"}, {"role": "assistant", "text": "red"}, {"role": "user", "text": "and this?"}]
    both = model.compress_features([[tiny.features(1, seed=seed)[0] for seed in range(3)]])[0]
    assert list(model.stream(caches, turns, 8)) == list(model.stream(both, turns, 8))


@pytest.mark.parametrize("method", ["voco", "none"])
def test_text_in_a_cache_answers_as_if_it_were_read(method):
    model = tiny.model(method, 2)
    (cache,) = model.compress_features([tiny.features(1 if method == "none" else 3)])
    prompts = prompts_of(model, ["what is it?", "where is this thing?"])
    with_text = model.keep_text(cache, prompts[0][:4])
    assert with_text.keys.shape[2] == cache.keys.shape[2] + 4
    other = [*prompts[0][:4], *prompts[1]]
    plain = tiny_logits(model, cache, [prompts[0], other])
    assert tiny.close(tiny_logits(model, with_text, [prompts[0], other]), plain)
    assert model.answer_ids([with_text, cache], [prompts[0], prompts[1]], 10) == model.answer_ids([cache, cache], prompts, 10)
    # the cached text matters: another one moves the logits
    wrong = replace(model.keep_text(cache, prompts[0][:4][::-1]), text_ids=with_text.text_ids)
    assert not tiny.close(tiny_logits(model, wrong, [prompts[0], other]), plain)


def tiny_logits(model, cache, prompts):
    """Logits (B, vocabulary) of the first new token of each prompt."""
    with torch.no_grad():
        uncached = [prompt[len(cache.text_ids) :] for prompt in prompts]
        return model.language_model.lm_head(model._prefill([cache] * len(prompts), uncached)[0])


def test_a_cache_with_text_takes_only_prompts_that_continue_it():
    model = tiny.model("voco", 2)
    (cache,) = model.compress_features([tiny.features(1)])
    with_text = model.keep_text(cache, [5, 6, 7])
    for prompt in ([5, 6], [5, 6, 7], [5, 6, 8, 9]):
        with pytest.raises(ValueError, match="does not continue them"):
            model.answer_ids([with_text], [prompt], 2)
    with pytest.raises(ValueError, match="cannot be joined"):
        join_caches([with_text, cache])
    with pytest.raises(ValueError, match="holds text"):
        with_text.take(1)
    with pytest.raises(ValueError, match="without text"):
        model.keep_text(with_text, [5])


def test_the_shared_beginning_of_prompts_is_the_system_prompt():
    model = tiny.model("voco", 2)
    layout = model.layout.model_copy(update={"template": "vicuna_v1"})
    shared = shared_prompt_ids(model.tokenizer, layout)
    text = model.tokenizer.decode(shared)
    assert "polite answers to the user's questions. USER:" in text
    for question in ("Where?", "1 of 2", " spaced"):
        ids = prompt_ids([{"role": "user", "text": question}], model.tokenizer, layout, True)
        assert ids[: len(shared)] == shared


def with_chatml(folder):
    """A LLaVA whose tokenizer has chatml's markers, but another end token."""
    reference = llava_world.llava()
    reference.resize_token_embeddings(264)
    uri = llava_world.saved(reference, folder)
    tokenizer = llava_world.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(uri)
    return uri


def test_an_answer_ends_with_the_end_token_of_its_template(tmp_path):
    uri = with_chatml(tmp_path / "theirs")
    model = build.create_model(Model(pretrained=uri), "voco", 2, Text(template="chatml"), [], seed=0)
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.layout.eos_id == end != model.tokenizer.eos_token_id
    tokens = iter(torch.tensor([[step], [65]]) for step in (66, end, 67))
    answers = [Answer(model.tokenizer, model.layout.eos_id) for _ in range(2)]
    list(collect_answers((step[:, 0] for step in tokens), answers, 3))
    assert [(answer.ended, len(answer.ids)) for answer in answers] == [("end token", 1), ("length", 3)]
    bare = llava_world.saved(llava_world.llava(), tmp_path / "bare")
    with pytest.raises(Refused, match=r"chatml needs <\|im_start\|>"):
        build.create_model(Model(pretrained=bare), "voco", 2, Text(template="chatml"), [], seed=0)


def test_a_job_that_changes_the_template_changes_how_answers_end(tmp_path):
    model = voco.model.load(with_chatml(tmp_path / "theirs"))
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "start" / "model")
    block = {"epochs": 1, "global_batch": 2, "micro_batch": 1, "learning_rate": 0.1, "text": {"template": "chatml"}}
    inputs = {"samples": [{"uri": "s"}], "features": "f", "checkpoint": str(tmp_path / "start")}
    job = {
        "name": "a", "kind": "image_sft", "output": str(tmp_path / "out"), "inputs": inputs,
        "compression": {"method": "voco", "tokens": 2}, "image_sft": block,
    }  # fmt: skip
    _, layout = initial_model(build_job("job.yaml", job), str(tmp_path / "out"))
    assert layout.eos_id == model.tokenizer.convert_tokens_to_ids("<|im_end|>") != model.layout.eos_id
