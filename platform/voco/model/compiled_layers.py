"""torch.compile of a decoder's layers: norms, projections with their rotation, and MLPs become a few kernels each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from voco.model.attention.plan import NAME, attend


def compile_layers(core: Any) -> None:
    """Compile the parts of each decoder layer of transformers' `core`, for any number of tokens, at their first calls.

    Attention itself stays as it is: its calls differ from batch to batch. Only `forward` is compiled, so hooks and recomputing of
    activations stay outside, and the last layer, which runs part by part (last_layer.py), profits too.
    """
    AttentionInterface.register(NAME, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]
    for layer in core.layers:
        for part in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp):
            part.forward = torch.compile(part.forward, dynamic=True)
    core.norm.forward = torch.compile(core.norm.forward, dynamic=True)
