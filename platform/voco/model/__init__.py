"""The method: masks, positions, the model, its caches. Torch and transformers only, never Ray or DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from voco.model.voco_llama import VocoLlama


def load(uri: str, device: str = "cpu") -> VocoLlama:
    """The model of a checkpoint directory: `model.compress(pixels)`, `model.generate(cache, text)`, `model.forward(batch)`.

    A LLaVA that others saved is read too, as it is: without <voco>.
    """
    from voco.model import build, weights
    from voco.store import storage

    ours = storage.exists(storage.join(storage.resolve(uri), "model", "config.json"))
    return weights.load_checkpoint(uri, device=device) if ours else build.load_pretrained(uri, device)


def export(checkpoint: str, output: str) -> list[str]:
    """Write a checkpoint as transformers' plain LLaVA and return what that cannot keep; `llava_export.py` says more."""
    from voco.model.interop import llava_export

    return llava_export.export_llava(checkpoint, output)
