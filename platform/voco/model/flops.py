"""Floating-point operations by counting: two for each multiply-accumulate of a matrix product or of attention."""

from __future__ import annotations

from typing import Any


def _heads(config: Any) -> tuple[int, int]:
    """Width of all query heads and of all key-value heads."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head), int(config.num_key_value_heads * head)


def layer_flops(config: Any, tokens: int, pairs: float) -> float:
    """One decoder layer over `tokens` of which `pairs` meet in attention. `config` is of a Llama-family model."""
    queries, keys = _heads(config)
    linear = config.hidden_size * (2 * queries + 2 * keys) + 3 * config.hidden_size * config.intermediate_size
    return float(2 * (linear * tokens + 2 * queries * pairs))


def read_flops(config: Any, cached: int, text: int, dense: bool = False) -> float:
    """Operations of reading `text` tokens against `cached` ready keys and values, with the output head for the last one.

    With `dense` every text token is counted as if it met all others, as FastV and the paper count; else causally.
    """
    pairs = text * cached + (text * text if dense else text * (text + 1) / 2)
    return float(config.num_hidden_layers * layer_flops(config, text, pairs) + 2 * config.hidden_size * config.vocab_size)


def fastv_flops(config: Any, tokens: int, dropped: int, layer: int, dense: bool = False) -> float:
    """Operations of a prefill of `tokens` of which `dropped` end with the first `layer` layers (FastV, arXiv 2403.06764).

    The one row of attention that says which is not counted, as its paper does not. `dense` as in `read_flops`.
    """

    def one(count: int) -> float:
        return layer_flops(config, count, count * count if dense else count * (count + 1) / 2)

    layers = layer * one(tokens) + (config.num_hidden_layers - layer) * one(tokens - dropped)
    return float(layers + 2 * config.hidden_size * config.vocab_size)


def image_flops(config: Any, tower: Any) -> float:
    """A CLIP tower up to its last layer but one, which LLaVA reads, and the two-layer projector, for one image."""
    width, side = tower.hidden_size, tower.image_size // tower.patch_size
    patches, layers = side * side, tower.num_hidden_layers - 1
    linear = 4 * width * width + 2 * width * tower.intermediate_size
    tokens = patches + 1  # its class token
    encoded = layers * (linear * tokens + 2 * width * tokens * tokens) + patches * width * 3 * tower.patch_size**2
    projected = patches * (width * config.hidden_size + config.hidden_size**2)
    return float(2 * (encoded + projected))


def compress_flops(config: Any, prefix: int, n: int) -> float:
    """Operations of one view's compression: `prefix` tokens and N <voco>, causally; of the last layer their keys and values."""
    tokens = prefix + n
    whole = (config.num_hidden_layers - 1) * layer_flops(config, tokens, tokens * (tokens + 1) / 2)
    return float(whole + 2 * n * config.hidden_size * 2 * _heads(config)[1])


def cache_bytes(config: Any, tokens: int, bytes_per_number: int) -> int:
    """Keys and values of `tokens` in every layer."""
    return int(2 * config.num_hidden_layers * _heads(config)[1] * tokens * bytes_per_number)


def fastv_bytes(config: Any, tokens: int, dropped: int, layer: int, bytes_per_number: int) -> int:
    """Keys and values of `tokens` in the first `layer` layers, and behind them of all but the `dropped` ones."""
    whole, gone = (cache_bytes(config, count, bytes_per_number) for count in (tokens, dropped))
    return whole - gone // int(config.num_hidden_layers) * (int(config.num_hidden_layers) - layer)
