"""FastV (arXiv 2403.06764, section 4): after layer K a question continues with few vision tokens. Training-free, inference only.

Which tokens stay is decided once, in the prefill, as in the authors' own code with a key-value cache: the tokens that the
prompt's last token attends to most in layer K (the last layer that sees everything), averaged over the heads. Positions do not
change. The choice depends on the question, so nothing is cached and every question runs its images again.
Legend: B samples, L tokens of all of them in one flat row, W model width, H query heads, G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from voco.methods import Method
from voco.model.attention.dense import DensePlan
from voco.model.attention.plan import plan_attention
from voco.model.batch import Batch, collate
from voco.model.rope import max_positions, rotate
from voco.model.sampling import Answer, collect_answers
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import NONE, TEXT, VISION, Layout, TokenSample, build_sample, text_start


def kept_tokens(slots: int, keep: float) -> int:
    """Vision tokens of a view that stay, of its `slots`: rounded, as the authors' code does."""
    return round(slots * keep)


def select_tokens(attention: Tensor, vision: Tensor, count: int) -> Tensor:
    """(M,) int64, ascending: indices of the tokens that stay, which are all but the vision tokens with too little attention.

    attention: (L,) float, what the last token pays to each; vision: (L,) bool; count: vision tokens that stay, at most all.
    Of tokens with equal attention the earlier stays.
    """
    indices = torch.nonzero(vision)[:, 0]
    order = torch.sort(attention[indices], descending=True, stable=True).indices
    stays = ~vision
    stays[indices[order[:count]]] = True
    return torch.nonzero(stays)[:, 0]


def fastv_answers(
    model: VocoLlama,
    views: Sequence[Sequence[Tensor]],
    prompts: Sequence[Sequence[int]],
    layer: int,
    count: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """New token ids for each prompt, up to its end token, which is left out; arguments as in `fastv_decode_steps`.

    Raises ValueError for a prompt whose answer could pass the model's last position.
    """
    positions = max_positions(model.language_model.config.to_dict())
    for sample_views, prompt in zip(views, prompts, strict=True):
        start = _text_start(model.layout, len(sample_views))
        if start + len(prompt) + max_new_tokens > positions:
            raise ValueError(
                f"{start} positions of views, a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit into "
                f"the model's {positions} positions"
            )
    answers = [Answer(model.tokenizer, model.layout.eos_id, stop_ids=model.layout.stop_ids) for _ in prompts]
    (*_, answers) = collect_answers(fastv_decode_steps(model, views, prompts, layer, count), answers, max_new_tokens)
    return [answer.ids for answer in answers]


@torch.no_grad()
def fastv_decode_steps(
    model: VocoLlama, views: Sequence[Sequence[Tensor]], prompts: Sequence[Sequence[int]], layer: int, count: int
) -> Iterator[Tensor]:
    """Greedy answers to one prompt (token ids) a sample: yields (B,) int64, the next token of each, without end.

    views: (V, C) features of each sample's views, none for text alone; layer: K, `count`: vision tokens that stay of each view
    (of several views of a sample the best together, whichever view they are of).
    Raises ValueError for a compressed model, and for a K outside 1 .. layers - 1.
    """
    core = model.language_model.model
    if not model.layout.rule.uncompressed:
        raise ValueError(f"fastv reads views that text sees completely: expected method none, got {model.layout.method}")
    if not 1 <= layer < len(core.layers):
        raise ValueError(f"fastv.layer: expected 1 to {len(core.layers) - 1}, fewer than the model's layers, got {layer}")
    batch = _prompt_batch(model, views, prompts)
    sizes = torch.bincount(batch.sample[0], minlength=len(prompts))
    last = (sizes.cumsum(0) - 1).to(model.device)
    ids, states, position = batch.token_ids, model.embed(batch), batch.position
    next_position = position[0, last] + 1
    cos_sin = core.rotary_emb(states, position)
    plan = plan_attention(model.attention, ids, False, model.device)
    past, stays, before = DynamicCache(), sizes, states
    for index, block in enumerate(core.layers):
        if index == layer:
            keys = past.layers[layer - 1].keys
            attention = _last_token_attention(core.layers[layer - 1], before, keys, cos_sin, last, sizes.tolist())
            rows = _select_rows(attention, ids.kind[0] == VISION, [count * len(sample_views) for sample_views in views])
            ids, stays = ids[:, rows], torch.bincount(ids.sample[0, rows], minlength=len(prompts))
            rows, last = rows.to(model.device), (stays.cumsum(0) - 1).to(model.device)
            states, position = states[:, rows], position[:, rows]
            cos_sin = core.rotary_emb(states, position)
            plan = plan_attention(model.attention, ids, False, model.device)
        before = states
        states = block(
            states, position_embeddings=cos_sin, position_ids=position, past_key_values=past, use_cache=True, plan=plan
        )
    states = core.norm(states[0, last])
    # from here on each sample has a row; in the first K layers it is longer than after them
    real = [(torch.arange(int(counts.max()))[None] < counts[:, None]).to(model.device) for counts in (sizes, stays)]
    for index, cached in enumerate(past.layers):
        cached.keys, cached.values = (_pad_rows(flat, real[index >= layer]) for flat in (cached.keys, cached.values))
    while True:
        token = model.choose(model.language_model.lm_head(states))
        yield token
        real = [torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1) for mask in real]
        plans = [DensePlan(mask[:, None, None]) for mask in real]  # one query sees every real key
        states = core.embed_tokens(token[:, None])
        cos_sin = core.rotary_emb(states, next_position[:, None])
        for index, block in enumerate(core.layers):
            states = block(
                states,
                position_embeddings=cos_sin,
                position_ids=next_position[:, None],
                past_key_values=past,
                use_cache=True,
                plan=plans[index >= layer],
            )
        states = core.norm(states)[:, 0]
        next_position = next_position + 1


def _prompt_batch(model: VocoLlama, views: Sequence[Sequence[Tensor]], prompts: Sequence[Sequence[int]]) -> Batch:
    """One flat row of each sample's views and its prompt, at the positions that method none gives them."""
    store = {str(number): view for number, view in enumerate(view for sample_views in views for view in sample_views)}
    names = iter(store)
    samples = []
    for sample_views, prompt in zip(views, prompts, strict=True):
        prefix = build_sample("", [], [next(names) for _ in sample_views], None, model.layout)
        start = _text_start(model.layout, len(sample_views))
        text: dict[str, Any] = {
            "ids": prompt,
            "position": range(start, start + len(prompt)),
            "kinds": TEXT,
            "view": NONE,
            "conversation": 0,
        }
        columns: dict[str, Any] = {name: _append(prefix, name, value, len(prompt)) for name, value in text.items()}
        samples.append(replace(prefix, **columns))
    empty = (model.layout.vision_slots, model.feature_width)
    return collate(samples, store.__getitem__, empty).to(model.device, model.dtype)


def _text_start(layout: Layout, views: int) -> int:
    """Position of a sample's first text token."""
    return text_start(layout, [layout.voco_tokens()] * views)


def _append(sample: TokenSample, name: str, value: Sequence[int] | int, count: int) -> NDArray[np.int64]:
    """A column of the sample with `count` values after it."""
    return np.concatenate([getattr(sample, name), np.broadcast_to(np.asarray(value, dtype=np.int64), count)])


def _last_token_attention(
    block: Any, states: Tensor, keys: Tensor, cos_sin: tuple[Tensor, Tensor], last: Tensor, sizes: list[int]
) -> list[Tensor]:
    """What each sample's last token pays to its tokens in a layer, averaged over the heads: (L,) of each, fp32 at least.

    states: (1, L, W) that went into the layer; keys: (1, G, L, E), rotated; cos_sin: (1, L, E) each; last: (B,) int64.
    One row of attention for each sample: the layer itself ran with a kernel that keeps no weights.
    """
    attention, width = block.self_attn, keys.shape[-1]
    query = attention.q_proj(block.input_layernorm(states[0, last])).unflatten(-1, (-1, width))  # (B, H, E)
    query = attention.q_norm(query) if hasattr(attention, "q_norm") else query
    query = rotate(query, *(table[0, last, None] for table in cos_sin))
    exact = torch.promote_types(query.dtype, torch.float32)
    weights = []
    for own_query, own_keys in zip(query.to(exact), torch.split(keys[0], sizes, dim=1), strict=True):
        grouped = own_query.unflatten(0, (len(own_keys), -1))  # (G, H / G, E): the heads that share keys
        weights.append((grouped @ own_keys.to(exact).mT * attention.scaling).softmax(dim=-1).mean(dim=(0, 1)))
    return weights


def _select_rows(attention: list[Tensor], vision: Tensor, counts: list[int]) -> Tensor:
    """(M,) int64 on the host: indices of the tokens in the flat row that stay, sample by sample."""
    sizes = [len(weights) for weights in attention]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    samples = zip(starts, attention, torch.split(vision, sizes), counts, strict=True)
    return torch.cat([start + select_tokens(weights.cpu(), mask, count) for start, weights, mask, count in samples])


def _pad_rows(flat: Tensor, real: Tensor) -> Tensor:
    """(B, G, longest, E) of (1, G, L, E): each sample's tokens in its own row, where `real` (B, longest) is True."""
    rows = flat.new_zeros(*real.shape, flat.shape[1], flat.shape[3])
    rows[real] = flat[0].transpose(0, 1)
    return rows.transpose(1, 2)


METHOD = Method()  # the checkpoint that it reads is uncompressed
