"""The shapes of the tiny world, in the words of a job file: one vision tower and one language model."""

from __future__ import annotations

from typing import Any


def tower(name: str = "efficientnet_lite0", **keys: Any) -> dict[str, Any]:
    """A `tower` block: images of 32 pixels, which EfficientNet-Lite0 makes into 4 vision slots of 112 channels."""
    return {"name": name, "image_size": 32, **keys}


def llama(**keys: Any) -> dict[str, Any]:
    """A `model.llama` block: two layers with grouped queries, heads of width 8."""
    return {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocabulary": 300, **keys}


TOWER = tower()
LLAMA = llama()
MODEL = {"llama": LLAMA, "tower": TOWER}
