"""The method: masks, positions, the model, its caches. Torch and transformers only, never Ray or DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from voco.model.voco_llama import VocoLlama


def load(uri: str, device: str = "cpu") -> VocoLlama:
    """The model of a checkpoint directory: `model.compress(pixels)`, `model.generate(cache, text)`, `model.forward(batch)`."""
    from voco.model import weights

    return weights.load(uri, device=device)
