"""Rotary position embedding with angles in fp64 (Su et al., arXiv 2104.09864), and the check for types that caches cannot use.

transformers multiplies position and frequency in fp32, whose rounding grows with the position: a key that is rotated to its
slot later would differ from one that is rotated at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STATIC = {"default", "linear", "llama3", "yarn"}  # frequencies do not change with the sequence's length


def check_rope(config: Any) -> None:
    """Raise ValueError for frequencies that depend on the sequence's length: cached keys would be wrong."""
    kind = config.rope_parameters["rope_type"]
    if kind not in STATIC:
        raise ValueError(
            f"rope type {kind!r} changes with the sequence's length, so cached keys would be wrong; use one of {sorted(STATIC)}"
        )


def sliding_window(config: dict[str, Any]) -> int | None:
    """The sliding window in positions, from `config.to_dict()`; None without one."""
    size = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return int(size) if size else None


def max_positions(config: dict[str, Any]) -> int:
    """Positions that a sample may have, from `config.to_dict()`.

    A model with a sliding window is exact up to the window's size, inside which every token sees all earlier ones.
    """
    positions = int(config["max_position_embeddings"])
    return min(positions, sliding_window(config) or positions)


class ExactRotary(nn.Module):
    """Replaces transformers' rotary module: same frequencies, fp64 angles, result in the input's dtype."""

    inv_freq: Tensor

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # a copy: buffers of the original may be meta tensors or shared
        self.register_buffer("inv_freq", original.inv_freq.detach().clone().double(), persistent=False)  # type: ignore[operator]
        self.attention_scaling = float(original.attention_scaling)  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> ExactRotary:
        # `.to(bfloat16)` must move the frequencies to the device and not change their precision
        self.inv_freq = self.inv_freq.to(device=fn(torch.empty(0, device=self.inv_freq.device)).device)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, L, head_dim) in x's dtype for positions (B, L) int64."""
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate keys (..., L, head_dim) by cos and sin of the same shape or broadcastable."""
    half = keys.shape[-1] // 2
    turned = torch.cat((-keys[..., half:], keys[..., :half]), dim=-1)
    return keys * cos + turned * sin
