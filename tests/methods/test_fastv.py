"""FastV equals the slow, obvious form: all attention weights, a mask that hides dropped tokens, no cache."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from voco.methods import fastv
from voco.model.generation import prompt_ids
from voco.model.rope import ExactRotary
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import TEXT, VISION, build_sample

# views and question of each sample: text alone, one image, several, and texts of several lengths
QUESTIONS = [
    (1, "what is it?"),
    (0, "say hello to all of us"),
    (3, "left or right of the circle, or is it neither?"),
    (2, "why?"),
]
STEPS = 6


def samples_of(model: VocoLlama, questions: list[tuple[int, str]] = QUESTIONS) -> tuple[list[list[Tensor]], list[list[int]]]:
    """Features of the views and prompt of each sample."""
    drawn = tiny.features(sum(views for views, _ in questions), dtype=model.dtype)
    features = iter(drawn)
    views = [[next(features) for _ in range(count)] for count, _ in questions]
    prompts = [prompt_ids(tiny.question(text), tiny.TOKENIZER, model.layout, bool(count)) for count, text in questions]  # type: ignore[arg-type]
    return views, prompts


def near(a: Tensor, b: Tensor) -> bool:
    """Equal in fp32, whatever the model's type: transformers' eager attention takes its softmax in fp32."""
    return bool((a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())))


def read(
    model: VocoLlama, views: list[list[Tensor]], prompts: list[list[int]], layer: int, count: int, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Tokens (B, steps) and the logits (B, steps, vocabulary) that they were chosen from."""
    logits_by_step: list[Tensor] = []
    choose = model.choose

    def spy(logits: Tensor) -> Tensor:
        logits_by_step.append(logits.clone())
        return choose(logits)

    model.choose = spy  # type: ignore[method-assign]
    try:
        tokens = list(itertools.islice(fastv.fastv_decode_steps(model, views, prompts, layer, count), steps))
    finally:
        del model.choose
    return torch.stack(tokens, dim=1), torch.stack(logits_by_step, dim=1)


@torch.no_grad()
def slowly(
    model: VocoLlama, views: list[Tensor], prompt: list[int], layer: int, count: int, changes: dict[str, Any], steps: int = STEPS
) -> tuple[list[int], Tensor, Tensor]:
    """One sample alone through transformers' own eager attention, the complete sequence again for every new token.

    Returns tokens, logits (steps, vocabulary) and which tokens of the prefill are hidden from layer K on.
    """
    plain = tiny.llama(model.dtype, **changes).eval()
    plain.set_attn_implementation("eager")
    llama = plain.model
    llama.rotary_emb = ExactRotary(llama.rotary_emb)
    weights: list[Tensor] = []
    for block in llama.layers:
        block.self_attn.register_forward_hook(lambda _module, _inputs, output: weights.append(output[1]))
    sample = build_sample("s", [], [str(index) for index in range(len(views))], None, model.layout)
    ids, vision = sample.ids.tolist() + prompt, torch.from_numpy(sample.kinds == VISION)
    prefill, hidden = len(ids), torch.zeros(0, dtype=torch.bool)
    tokens: list[int] = []
    step_logits: list[Tensor] = []
    for _ in range(steps):
        states = llama.embed_tokens(torch.tensor([ids]))
        if views:
            states[0, : len(vision)][vision] = model.projector(torch.stack(views)).flatten(0, 1)
        length = len(ids)
        position = torch.arange(length)[None]
        cos_sin = llama.rotary_emb(states, position)
        open_ = torch.ones(length, length, dtype=torch.bool).tril()
        for index, block in enumerate(llama.layers):
            if index == layer:
                attention = weights[-1][0, :, prefill - 1, : len(vision)].mean(dim=0)  # (heads, last of the prompt, views)
                stays = sorted(torch.nonzero(vision)[:, 0].tolist(), key=lambda token: (-float(attention[token]), token))[
                    : count * len(views)
                ]
                hidden = torch.zeros(length, dtype=torch.bool)
                hidden[: len(vision)] = vision & ~torch.isin(torch.arange(len(vision)), torch.tensor(stays, dtype=torch.int64))
                open_ = (open_ & ~hidden[None]) | torch.eye(length, dtype=torch.bool)
            mask = torch.zeros(length, length, dtype=model.dtype).masked_fill(~open_, -torch.inf)[None, None]
            states = block(states, attention_mask=mask, position_ids=position, position_embeddings=cos_sin)
        logits = plain.lm_head(llama.norm(states))[0, -1]
        step_logits.append(logits)
        tokens.append(int(model.choose(logits[None].clone())[0]))
        ids.append(tokens[-1])
    return tokens, torch.stack(step_logits), hidden


@pytest.mark.parametrize(
    ("layer", "count", "changes"),
    [
        (1, 1, {}), (1, 4, {}), (2, 1, {}), (2, 4, {}), (2, 8, {}),
        (3, 3, {"num_hidden_layers": 5, "num_key_value_heads": 1}), (2, 3, {"num_hidden_layers": 4, "num_key_value_heads": 4}),
    ],
)  # fmt: skip
def test_a_mixed_batch_equals_each_sample_alone_by_the_slow_form(layer: int, count: int, changes: dict[str, Any]) -> None:
    model = tiny.model("none", 2, **changes)
    views, prompts = samples_of(model)
    for order in ([0, 1, 2, 3], [2, 1], [3, 0, 1, 2, 0], [1]):
        tokens, logits = read(model, [views[sample] for sample in order], [prompts[sample] for sample in order], layer, count)
        for row, sample in enumerate(order):
            expected, expected_logits, _ = slowly(model, views[sample], prompts[sample], layer, count, changes)
            assert tokens[row].tolist() == expected
            assert near(logits[row], expected_logits)


def test_the_slow_form_detects_a_wrong_choice() -> None:
    """Dropping other tokens, or dropping them a layer later, moves the logits by more than 1e-2."""
    model = tiny.model("none", 2)
    views, prompts = samples_of(model, QUESTIONS[:1])
    _, right, hidden = slowly(model, views[0], prompts[0], 1, 4, {}, steps=1)
    assert int(hidden.sum()) == tiny.VISION_SLOTS - 4
    for layer, count in ((2, 4), (1, 5), (1, 3)):
        assert (slowly(model, views[0], prompts[0], layer, count, {}, steps=1)[1] - right).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layer", [1, 2])
def test_with_all_tokens_kept_it_is_the_model_of_method_none(layer: int, dtype: torch.dtype) -> None:
    model = tiny.model("none", 1, dtype)
    views, prompts = samples_of(model)
    count = fastv.kept_tokens(tiny.VISION_SLOTS, 1.0)
    answers = fastv.fastv_answers(model, views, prompts, layer, count, 12)
    caches = [model.compress_features([sample_views])[0] if sample_views else None for sample_views in views]
    assert answers == model.answer_ids(caches, prompts, 12)
    _, logits = read(model, views, prompts, layer, count, steps=1)
    for row, (sample_views, prompt) in enumerate(zip(views, prompts, strict=True)):
        batch = fastv._prompt_batch(model, [sample_views], [prompt])
        assert (batch.kind == TEXT).sum() == len(prompt)
        assert tiny.close(logits[row, 0], model.logits(batch)[0, -1])


def test_an_answer_ends_at_its_end_token_and_other_rows_continue() -> None:
    model = tiny.model("none", 1)
    views, prompts = samples_of(model)
    tokens, _ = read(model, views, prompts, 1, 3, steps=8)
    end = int(tokens[0, 2])
    model.layout = model.layout.model_copy(update={"eos_id": end})
    expected = [list(itertools.takewhile(lambda token: token != end, row)) for row in tokens.tolist()]
    assert len(expected[0]) <= 2
    assert fastv.fastv_answers(model, views, prompts, 1, 3, 8) == expected


def test_of_equal_attention_the_earlier_token_stays() -> None:
    attention = torch.tensor([9.0, 0.5, 0.5, 0.7, 0.5, 0.5, 0.5, 9.0])
    vision = torch.tensor([False, True, True, True, True, True, False, False])
    assert fastv.select_tokens(attention, vision, 0).tolist() == [0, 6, 7]
    assert fastv.select_tokens(attention, vision, 3).tolist() == [0, 1, 2, 3, 6, 7]
    assert fastv.select_tokens(attention, vision, 5).tolist() == list(range(8))
    flat = torch.full((600,), 1 / 600)
    assert fastv.select_tokens(flat, torch.ones(600, dtype=torch.bool), 64).tolist() == list(range(64))


def test_the_shares_of_the_papers_table_are_its_tokens() -> None:
    """R of 0.889 and 0.998 leave 64 and 1 of 576 (VoCo-LLaMA's supplement, Table 3)."""
    assert [fastv.kept_tokens(576, keep) for keep in (1 - 0.889, 1 - 0.998, 0.5, 1.0)] == [64, 1, 288, 576]


def test_impossible_arguments_are_errors() -> None:
    model, other = tiny.model("none", 1, max_position_embeddings=40), tiny.model("voco", 1)
    views, prompts = samples_of(model, [(2, "what is it?")])
    start = 2 * (model.layout.prefix_length + 1)
    room = 40 - start - len(prompts[0])
    assert len(fastv.fastv_answers(model, views, prompts, 1, 3, room)[0]) <= room
    with pytest.raises(ValueError, match=f"{start} positions of views, a prompt of {len(prompts[0])} tokens.*40 positions"):
        fastv.fastv_answers(model, views, prompts, 1, 3, room + 1)
    with pytest.raises(ValueError, match="expected method none, got voco"):
        next(fastv.fastv_decode_steps(other, views, prompts, 1, 3))
    for layer in (0, 3):
        with pytest.raises(ValueError, match=f"expected 1 to 2, fewer than the model's layers, got {layer}"):
            next(fastv.fastv_decode_steps(model, views, prompts, layer, 3))
