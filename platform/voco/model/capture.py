"""Each layer's keys and values as they leave their projections: what caches are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capture(language_model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect each layer's keys (after any key norm, before RoPE) and values, (B, L, H, E), of one forward pass."""
    states: list[tuple[Tensor, Tensor]] = []
    pending: dict[str, Tensor] = {}
    config = language_model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            pending[name] = output.view(*output.shape[:2], -1, width)
            if len(pending) == 2:
                states.append((pending.pop("keys"), pending.pop("values")))

        return hook

    handles = []
    for layer in language_model.model.layers:
        attention = layer.self_attn
        handles.append(getattr(attention, "k_norm", attention.k_proj).register_forward_hook(keep("keys")))
        handles.append(attention.v_proj.register_forward_hook(keep("values")))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
