"""The files of a checkpoint directory, at a local path or `s3://`. No torch, so that jobs can be planned without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from voco.store import storage

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # in `model/`


def model_uri(checkpoint: str) -> str:
    """The directory of the weights, the tokenizer, the processor and the configuration."""
    return storage.join(storage.resolve(checkpoint), "model")


def config_uri(checkpoint: str) -> str:
    """The checkpoint's configuration, which is written last."""
    return storage.join(model_uri(checkpoint), CONFIG_FILE)


def has_model(checkpoint: str) -> bool:
    """True for a complete checkpoint of ours."""
    return storage.exists(config_uri(checkpoint))


def compressor_uri(checkpoint: str) -> str:
    """Inside a video checkpoint, the frozen checkpoint that made its caches (docs/method.md, Compressor)."""
    return storage.join(storage.resolve(checkpoint), "compressor")


def own_compressor(checkpoint: str) -> bool:
    """True where a checkpoint contains such a compressor; any other checkpoint makes its caches itself."""
    return has_model(compressor_uri(checkpoint))


def head_width(config: Any) -> int:
    """Width of one head of a Llama-family language model: from transformers' configuration, or its dict in a checkpoint."""
    if isinstance(config, dict):
        config = SimpleNamespace(**config)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
