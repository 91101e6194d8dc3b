"""Floating-point operations by counting: two for each multiply-accumulate."""

from __future__ import annotations

from typing import Any


def read_flops(config: Any, cached: int, text: int) -> float:
    """Operations of reading `text` tokens against `cached` ready keys and values, with the output head for the last one.

    `config` is transformers' configuration of a Llama-family model.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    linear = width * (2 * queries + 2 * keys) + 3 * width * config.intermediate_size
    pairs = text * cached + text * (text + 1) / 2
    return float(2 * (layers * (linear * text + 2 * queries * pairs) + width * config.vocab_size))


def cache_bytes(config: Any, tokens: int, bytes_per_number: int) -> int:
    """Keys and values of `tokens` in every layer."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head * tokens * bytes_per_number)
