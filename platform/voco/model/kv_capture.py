"""Each layer's keys and values as they leave their projections: the content of caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from voco.model.attention.plan import AttentionPlan
from voco.model.checkpoint_layout import head_width


@contextmanager
def capture_keys_values(layers: Any, width: int, rows: Tensor | None = None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect keys (after any key norm, before RoPE) and values of each layer that runs, (M, H, E) for heads of `width`.

    `rows` (M,) int64 are the rows of the flattened batch to collect; default: all.
    """
    states: list[tuple[Tensor, Tensor]] = []
    pending: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            flat = output.view(output.shape[0] * output.shape[1], -1, width)
            pending[name] = flat if rows is None else flat[rows]
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


def compute_keys_values(
    language_model: Any, embeds: Tensor, position: Tensor, plan: AttentionPlan, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values (D, H, M, E) of `rows` (M,) of the flattened embeds (B, L, W), and nothing that they do not need.

    The last layer only projects those rows: no attention and no MLP, and neither final norm nor vocabulary after it.
    """
    core, width = language_model.model, head_width(language_model.config)
    cos_sin = core.rotary_emb(embeds, position)
    *inner, last = core.layers
    with capture_keys_values(inner, width, rows) as states:
        for layer in inner:
            embeds = layer(embeds, position_embeddings=cos_sin, position_ids=position, plan=plan)
    inputs = last.input_layernorm(embeds.flatten(0, 1)[rows])
    keys, values = (project(inputs).unflatten(-1, (-1, width)) for project in (last.self_attn.k_proj, last.self_attn.v_proj))
    normed = last.self_attn.k_norm(keys) if hasattr(last.self_attn, "k_norm") else keys
    states.append((normed, values))
    return torch.stack([keys for keys, _ in states]).transpose(1, 2), torch.stack([values for _, values in states]).transpose(
        1, 2
    )
