"""FastV (arXiv 2403.06764, section 4): behind layer K a question goes on with few vision tokens. Training-free, inference only.

Which ones stay is decided once, in the prefill, as the authors' own code with a key-value cache does: those that the prompt's
last token attends to most in layer K (the last of the K that see everything), averaged over its heads. Positions stay as they
were. The choice hangs on the question, so nothing is made beforehand and every question runs its images anew.
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

from voco.model.attention.backends import DensePlan, plan_attention
from voco.model.batch import Batch, collate
from voco.model.rope import max_positions, rotate
from voco.model.sampling import Answer, collect_answers
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import NONE, TEXT, VISION, Layout, TokenSample, build_sample, text_start


def kept_tokens(slots: int, keep: float) -> int:
    """Vision tokens of a view that stay, of its `slots`: rounded, as the authors' code does."""
    return round(slots * keep)


def select_tokens(attention: Tensor, vision: Tensor, count: int) -> Tensor:
    """(M,) int64, ascending: the places of a sequence that stay, which are all but the vision tokens with too little attention.

    attention: (L,) float, what the last token pays to each; vision: (L,) bool; count: vision tokens that stay, at most all.
    Of equal ones the earlier stays.
    """
    places = torch.nonzero(vision)[:, 0]
    order = torch.sort(attention[places], descending=True, stable=True).indices
    stays = ~vision
    stays[places[order[:count]]] = True
    return torch.nonzero(stays)[:, 0]


def fastv_answers(
    model: VocoLlama,
    views: Sequence[Sequence[Tensor]],
    prompts: Sequence[Sequence[int]],
    layer: int,
    count: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """New token ids for each prompt, up to its end token, which is left out; arguments as in `read`.

    Raises ValueError for a prompt whose answer could pass the model's last position.
    """
    most = max_positions(model.language_model.config.to_dict())
    for some, prompt in zip(views, prompts, strict=True):
        start = _start(model.layout, len(some))
        if start + len(prompt) + max_new_tokens > most:
            raise ValueError(
                f"{start} positions of views, a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit into "
                f"the model's {most} positions"
            )
    answers = [Answer(model.tokenizer, model.layout.eos_id) for _ in prompts]
    (*_, answers) = collect_answers(fastv_decode_steps(model, views, prompts, layer, count), answers, max_new_tokens)
    return [answer.ids for answer in answers]


@torch.no_grad()
def fastv_decode_steps(
    model: VocoLlama, views: Sequence[Sequence[Tensor]], prompts: Sequence[Sequence[int]], layer: int, count: int
) -> Iterator[Tensor]:
    """Greedy answers to one prompt (token ids) a sample: yields (B,) int64, the next token of each, without end.

    views: (V, C) features of each sample's views, none for text alone; layer: K, `count`: vision tokens that stay of each view
    (of several views of a sample the best together, whichever view they are of).
    Raises ValueError for another method than none, and for a K outside 1 .. layers - 1.
    """
    core = model.language_model.model
    if model.layout.method != "none":
        raise ValueError(f"fastv reads views that text sees whole: expected method none, got {model.layout.method}")
    if not 1 <= layer < len(core.layers):
        raise ValueError(f"fastv.layer: expected 1 to {len(core.layers) - 1}, fewer than the model's layers, got {layer}")
    batch = _asked(model, views, prompts)
    sizes = torch.bincount(batch.sample[0], minlength=len(prompts))
    last = (sizes.cumsum(0) - 1).to(model.device)
    ids, states, position = batch.token_ids, model.embed(batch), batch.position
    text_at = position[0, last] + 1
    around = core.rotary_emb(states, position)
    seen = plan_attention(model.attention, ids, "none", model.device)
    past, stays, before = DynamicCache(), sizes, states
    for index, block in enumerate(core.layers):
        if index == layer:
            paid = _paid(core.layers[layer - 1], before, past.layers[layer - 1].keys, around, last, sizes.tolist())
            at = _stay(paid, ids.kind[0] == VISION, [count * len(some) for some in views])
            ids, stays = ids[:, at], torch.bincount(ids.sample[0, at], minlength=len(prompts))
            at, last = at.to(model.device), (stays.cumsum(0) - 1).to(model.device)
            states, position = states[:, at], position[:, at]
            around = core.rotary_emb(states, position)
            seen = plan_attention(model.attention, ids, "none", model.device)
        before = states
        states = block(states, position_embeddings=around, position_ids=position, past_key_values=past, use_cache=True, seen=seen)
    states = core.norm(states[0, last])
    # from here on a sample has a row of its own, in the first K layers a longer one than behind them
    shown = [torch.arange(int(some.max()))[None] < some[:, None] for some in (sizes, stays)]
    shown = [some.to(model.device) for some in shown]
    for index, held in enumerate(past.layers):
        held.keys, held.values = (_rows(flat, shown[index >= layer]) for flat in (held.keys, held.values))
    while True:
        token = model.choose(model.language_model.lm_head(states))
        yield token
        shown = [torch.cat((some, torch.ones_like(some[:, :1])), dim=1) for some in shown]
        sees = [DensePlan(some[:, None, None]) for some in shown]  # one query sees every real key
        states = core.embed_tokens(token[:, None])
        around = core.rotary_emb(states, text_at[:, None])
        for index, block in enumerate(core.layers):
            states = block(
                states,
                position_embeddings=around,
                position_ids=text_at[:, None],
                past_key_values=past,
                use_cache=True,
                seen=sees[index >= layer],
            )
        states = core.norm(states)[:, 0]
        text_at = text_at + 1


def _asked(model: VocoLlama, views: Sequence[Sequence[Tensor]], prompts: Sequence[Sequence[int]]) -> Batch:
    """One flat row of each sample's views and its prompt, at the positions that method none gives them."""
    store = {str(at): view for at, view in enumerate(view for some in views for view in some)}
    names = iter(store)
    samples = []
    for some, prompt in zip(views, prompts, strict=True):
        seen = build_sample("", [], [next(names) for _ in some], None, model.layout)
        start = _start(model.layout, len(some))
        text: dict[str, Any] = {
            "ids": prompt,
            "position": range(start, start + len(prompt)),
            "kinds": TEXT,
            "view": NONE,
            "conversation": 0,
        }
        columns: dict[str, Any] = {name: _behind(seen, name, value, len(prompt)) for name, value in text.items()}
        samples.append(replace(seen, **columns))
    empty = (model.layout.vision_slots, model.feature_width)
    return collate(samples, store.__getitem__, empty).to(model.device, model.dtype)


def _start(layout: Layout, views: int) -> int:
    """Position of a sample's first text token."""
    return text_start(layout, [layout.voco_tokens()] * views)


def _behind(sample: TokenSample, name: str, value: Sequence[int] | int, count: int) -> NDArray[np.int64]:
    return np.concatenate([getattr(sample, name), np.broadcast_to(np.asarray(value, dtype=np.int64), count)])


def _paid(
    block: Any, states: Tensor, keys: Tensor, around: tuple[Tensor, Tensor], last: Tensor, sizes: list[int]
) -> list[Tensor]:
    """What each sample's last token pays to its tokens in a layer, averaged over the heads: (L,) of each, fp32 at least.

    states: (1, L, W) that went into the layer; keys: (1, G, L, E), rotated; around: cos and sin (1, L, E); last: (B,) int64.
    One row of the attention a sample: the layer itself ran by a kernel that keeps no weights.
    """
    attention, width = block.self_attn, keys.shape[-1]
    query = attention.q_proj(block.input_layernorm(states[0, last])).unflatten(-1, (-1, width))  # (B, H, E)
    query = attention.q_norm(query) if hasattr(attention, "q_norm") else query
    query = rotate(query, *(some[0, last, None] for some in around))
    exact = torch.promote_types(query.dtype, torch.float32)
    found = []
    for one, mine in zip(query.to(exact), torch.split(keys[0], sizes, dim=1), strict=True):
        shared = one.unflatten(0, (len(mine), -1))  # (G, H / G, E): the heads that share keys
        found.append((shared @ mine.to(exact).mT * attention.scaling).softmax(dim=-1).mean(dim=(0, 1)))
    return found


def _stay(paid: list[Tensor], vision: Tensor, counts: list[int]) -> Tensor:
    """(M,) int64 on the host: the places in the flat row that stay, sample by sample."""
    sizes = [len(one) for one in paid]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    each = zip(starts, paid, torch.split(vision, sizes), counts, strict=True)
    return torch.cat([start + select_tokens(one.cpu(), seen, count) for start, one, seen, count in each])


def _rows(flat: Tensor, real: Tensor) -> Tensor:
    """(B, G, longest, E) of (1, G, L, E): each sample's tokens in a row of their own, where `real` (B, longest) says."""
    rows = flat.new_zeros(*real.shape, flat.shape[1], flat.shape[3])
    rows[real] = flat[0].transpose(0, 1)
    return rows.transpose(1, 2)
