"""The method: masks, positions, the model, its caches. Torch and transformers only, never Ray or DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from voco.model.voco_llama import VocoLlama


def load(uri: str, device: str = "cpu") -> VocoLlama:
    """The model of a checkpoint: `model.compress(pixels)`, `model.generate(cache, text)`, `model.forward(batch)`.

    A LLaVA that another project saved is loaded unchanged, without <voco>.
    """
    from voco.model import build, checkpoint_layout, weights

    own = checkpoint_layout.has_model(uri)
    return weights.load_checkpoint(uri, device=device) if own else build.load_pretrained(uri, device)


def export(checkpoint: str, output: str) -> list[str]:
    """Write a checkpoint as transformers' plain LLaVA and return what that format cannot keep (`interop/llava_export.py`)."""
    from voco.model.interop import llava_export

    return llava_export.export_llava(load(checkpoint), checkpoint, output)
