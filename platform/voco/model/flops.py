"""Floating-point operations and cached bytes, by counting: two operations for each multiply-accumulate. No torch."""

from __future__ import annotations

import re
from typing import Any

from voco.model.checkpoint_layout import head_width

# Dense bf16 peaks of the makers' data sheets, in TFLOP/s, by Ray's accelerator type
PEAK_TFLOPS = {
    "A100": 312.0, "A100-40G": 312.0, "A100-80G": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L4": 121.0, "L40S": 362.0,
    "A10G": 70.0, "T4": 65.0, "V100": 125.0, "RTX4090": 165.0,
}  # fmt: skip
PCIE_TFLOPS = {"H100": 756.0}  # of cards whose PCIe form is slower


def device_peak_tflops(name: str) -> float | None:
    """Dense bf16 peak of a GPU by its driver's name, such as `NVIDIA H100 80GB HBM3`, in TFLOP/s; None for an unknown one."""
    words = re.findall(r"[A-Z0-9]+", re.sub(r"RTX\s+", "RTX", name).upper())
    device = next((word for word in words if word in PEAK_TFLOPS), None)
    if device is None:
        return None
    return PCIE_TFLOPS.get(device, PEAK_TFLOPS[device]) if "PCIE" in words else PEAK_TFLOPS[device]


def _head_widths(config: Any) -> tuple[int, int]:
    """Width of all query heads and of all key-value heads."""
    width = head_width(config)
    return config.num_attention_heads * width, config.num_key_value_heads * width


def layer_flops(config: Any, tokens: int, pairs: float) -> float:
    """One decoder layer over `tokens`, with `pairs` of them in attention. `config` is of a Llama-family model."""
    queries, keys = _head_widths(config)
    linear = config.hidden_size * (2 * queries + 2 * keys) + 3 * config.hidden_size * config.intermediate_size
    return float(2 * (linear * tokens + 2 * queries * pairs))


def read_flops(config: Any, cached: int, text: int, dense: bool = False) -> float:
    """Operations of reading `text` tokens against `cached` keys and values, with the output head for the last one.

    With `dense` every text token counts as if it met all others, as FastV and the paper count; else causally.
    """
    pairs = text * cached + (text * text if dense else text * (text + 1) / 2)
    return float(config.num_hidden_layers * layer_flops(config, text, pairs) + 2 * config.hidden_size * config.vocab_size)


def training_flops(config: Any, tokens: int, pairs: float, predictions: int, projected: int, features: int) -> float:
    """Operations of one forward pass of training over `tokens` with `pairs` of them in attention, as `voco plan` counts them.

    The output head runs for `predictions` tokens, the projector for `projected` vision tokens of `features` channels. Every
    layer counts in full, also the last one, of which only what predictions need is run.
    """
    width = config.hidden_size
    layers = config.num_hidden_layers * layer_flops(config, tokens, pairs)
    return float(layers + 2 * predictions * width * config.vocab_size + 2 * projected * (features * width + width * width))


def fastv_flops(config: Any, tokens: int, dropped: int, layer: int, dense: bool = False) -> float:
    """Operations of a prefill of `tokens`, of which `dropped` pass the first `layer` layers only (FastV, arXiv 2403.06764).

    As in its paper, the row of attention that ranks the tokens does not count. `dense` as in `read_flops`.
    """

    def prefill(count: int) -> float:
        return layer_flops(config, count, count * count if dense else count * (count + 1) / 2)

    layers = layer * prefill(tokens) + (config.num_hidden_layers - layer) * prefill(tokens - dropped)
    return float(layers + 2 * config.hidden_size * config.vocab_size)


def image_flops(config: Any, tower: Any) -> float:
    """A CLIP tower up to its second-to-last layer, which LLaVA reads, and the two-layer projector, for one image."""
    width, side = tower.hidden_size, tower.image_size // tower.patch_size
    patches, layers = side * side, tower.num_hidden_layers - 1
    linear = 4 * width * width + 2 * width * tower.intermediate_size
    tokens = patches + 1  # its class token
    encoded = layers * (linear * tokens + 2 * width * tokens * tokens) + patches * width * 3 * tower.patch_size**2
    projected = patches * (width * config.hidden_size + config.hidden_size**2)
    return float(2 * (encoded + projected))


def compress_flops(config: Any, prefix: int, n: int) -> float:
    """Operations of one view's compression: `prefix` tokens and N <voco>, causally; of the last layer only its projections."""
    tokens = prefix + n
    inner = (config.num_hidden_layers - 1) * layer_flops(config, tokens, tokens * (tokens + 1) / 2)
    return float(inner + 2 * n * config.hidden_size * 2 * _head_widths(config)[1])


def cache_bytes(config: Any, tokens: int, bytes_per_number: int) -> int:
    """Keys and values of `tokens` in every layer."""
    return int(2 * config.num_hidden_layers * _head_widths(config)[1] * tokens * bytes_per_number)


def fastv_bytes(config: Any, tokens: int, dropped: int, layer: int, bytes_per_number: int) -> int:
    """Keys and values of `tokens` in the first `layer` layers, and in the others of all but the `dropped` ones."""
    all_layers, dropped_bytes = (cache_bytes(config, count, bytes_per_number) for count in (tokens, dropped))
    return all_layers - dropped_bytes // int(config.num_hidden_layers) * (int(config.num_hidden_layers) - layer)
