"""The decoder's states where something reads them: nothing looks at the last layer's output at the other positions.

A loss reads the positions that predict, a prefill the last position of each prompt: a few per cent of all. The last layer runs
on those rows only: its MLP and the final norm; its queries, where the attention plan can leave the others out; and its keys and
values at the positions that those queries see. Under voco that is the text and the <voco>, not the vision tokens. Exact.

Legend: B rows, L tokens of a row, W model width, M rows of the flattened (B x L); of a `RowsPlan` U queries and K keys; E head
width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from voco.model.attention.plan import AttentionPlan, RowsPlan, attend
from voco.model.rope import rotate


def states_of_rows(
    core: Any,
    embeds: Tensor,
    position: Tensor,
    plan: AttentionPlan,
    rows: Tensor,
    past: Any = None,
    part: RowsPlan | None = None,
) -> Tensor:
    """(M, W): the last layer's normalised states at `rows` (M,) int64 of the flattened embeds (B, L, W).

    core: transformers' decoder of the Llama family, layers whose attention and MLP each follow a norm and end in a sum;
    position: (B, L) int64; past: a transformers cache that is read and added to; part: of the plan, for these rows and without
    a cache (default: the last layer attends everywhere).
    """
    cos_sin = core.rotary_emb(embeds, position)
    options = {"position_embeddings": cos_sin, "position_ids": position, "past_key_values": past, "plan": plan}
    *inner, last = core.layers
    for layer in inner:
        embeds = layer(embeds, use_cache=past is not None, **options)
    if part is None:
        attended, _ = last.self_attn(hidden_states=last.input_layernorm(embeds), attention_mask=None, **options)
        states = (embeds + attended).flatten(0, 1).index_select(0, rows)
    else:
        flat = embeds.flatten(0, 1)
        normed = last.input_layernorm(flat.index_select(0, part.keys))
        cos, sin = (angles.flatten(0, 1).index_select(0, part.keys) for angles in cos_sin)
        states = flat.index_select(0, rows) + _attend_part(last.self_attn, normed, cos, sin, part)
    states = states + last.mlp(last.post_attention_layernorm(states))
    final: Tensor = core.norm(states)
    return final


def _attend_part(attention: Any, normed: Tensor, cos: Tensor, sin: Tensor, part: RowsPlan) -> Tensor:
    """(M, W) outputs of a layer's attention for the rows of a part, of its normalised inputs (K, W) and angles (K, E).

    Its modules run in the order of transformers' own forward, in which ZeRO-3 has gathered their weights.
    """

    def heads(name: str, states: Tensor) -> Tensor:  # (1, heads, tokens, E)
        split = getattr(attention, f"{name}_proj")(states).unflatten(-1, (-1, cos.shape[-1]))
        norm = getattr(attention, f"{name}_norm", None)
        normed_heads: Tensor = split if norm is None else norm(split)
        return normed_heads.transpose(0, 1)[None]

    query = heads("q", normed.index_select(0, part.queries))
    key, value = heads("k", normed), heads("v", normed)
    query = rotate(query, cos.index_select(0, part.queries), sin.index_select(0, part.queries))
    dropout = attention.attention_dropout if attention.training else 0.0
    out, _ = attend(
        attention, query, rotate(key, cos, sin), value, None, scaling=attention.scaling, plan=part.plan, dropout=dropout
    )
    output: Tensor = attention.o_proj(out[0].index_select(0, part.back).flatten(1))
    return output
