"""The decoder's states where something reads them: nothing looks at the last layer's output at the other positions.

A loss reads the positions that predict, a prefill the last position of each prompt: a few per cent of all. The last layer
attends everywhere (its keys and values are read), but its MLP and the final norm run on those rows only. Exact.

Legend: B rows, L tokens of a row, W model width, M rows of the flattened (B x L).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from voco.model.attention.plan import AttentionPlan


def states_of_rows(core: Any, embeds: Tensor, position: Tensor, plan: AttentionPlan, rows: Tensor, past: Any = None) -> Tensor:
    """(M, W): the last layer's normalised states at `rows` (M,) int64 of the flattened embeds (B, L, W).

    core: transformers' decoder of the Llama family, layers whose attention and MLP each follow a norm and end in a sum;
    position: (B, L) int64; past: a transformers cache that is read and added to.
    """
    cos_sin = core.rotary_emb(embeds, position)
    options = {"position_embeddings": cos_sin, "position_ids": position, "past_key_values": past, "plan": plan}
    *inner, last = core.layers
    for layer in inner:
        embeds = layer(embeds, use_cache=past is not None, **options)
    attended, _ = last.self_attn(hidden_states=last.input_layernorm(embeds), attention_mask=None, **options)
    states = (embeds + attended).flatten(0, 1).index_select(0, rows)
    states = states + last.mlp(last.post_attention_layernorm(states))
    normed: Tensor = core.norm(states)
    return normed
