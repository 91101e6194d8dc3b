"""Each layer's keys and values as they leave their projections: what caches are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from voco.model.attention.backends import AttentionPlan


@contextmanager
def capture_keys_values(layers: Any, width: int, kept: Tensor | None = None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect keys (after any key norm, before RoPE) and values of each layer that runs, (M, H, E) for heads of `width`.

    `kept` (M,) int64 are the rows of the flattened batch that are collected; default: all.
    """
    states: list[tuple[Tensor, Tensor]] = []
    pending: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            rows = output.view(output.shape[0] * output.shape[1], -1, width)
            pending[name] = rows if kept is None else rows[kept]
            if len(pending) == 2:
                states.append((pending.pop("keys"), pending.pop("values")))

        return hook

    handles = []
    for layer in layers:
        attention = layer.self_attn
        handles.append(getattr(attention, "k_norm", attention.k_proj).register_forward_hook(keep("keys")))
        handles.append(attention.v_proj.register_forward_hook(keep("values")))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def head_width(config: Any) -> int:
    """E of a transformers configuration of the Llama family."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def compute_keys_values(
    language_model: Any, embeds: Tensor, position: Tensor, seen: AttentionPlan, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values (D, H, M, E) of the `kept` (M,) rows of embeds (B, L, W), and nothing that they do not need.

    The last layer projects those rows and does no more: no attention, no MLP, no norm and no vocabulary behind it.
    """
    core, width = language_model.model, head_width(language_model.config)
    around = core.rotary_emb(embeds, position)
    *inner, last = core.layers
    with capture_keys_values(inner, width, kept) as states:
        for layer in inner:
            embeds = layer(embeds, position_embeddings=around, position_ids=position, seen=seen)
    rows = last.input_layernorm(embeds.flatten(0, 1)[kept])
    keys, values = (project(rows).unflatten(-1, (-1, width)) for project in (last.self_attn.k_proj, last.self_attn.v_proj))
    normed = last.self_attn.k_norm(keys) if hasattr(last.self_attn, "k_norm") else keys
    states.append((normed, values))
    return torch.stack([one for one, _ in states]).transpose(1, 2), torch.stack([one for _, one in states]).transpose(1, 2)
