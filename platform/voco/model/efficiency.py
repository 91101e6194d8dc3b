"""`make efficiency`: the paper's efficiency table (its Table 7), recomputed by counting, for several lengths of the text.

One image of 576 vision tokens, CLIP ViT-L/14 at 336 pixels, caches in bf16. Operations are those of one answer's first token:
without a cache tower, projector and all tokens; with a cache the text alone, against 576 or N cached tokens. FastV has no
cache: K layers see every token, the others N of the vision tokens. Dense attention, as the paper counts. No weights are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from voco.model.flops import cache_bytes, compress_flops, fastv_flops, image_flops, read_flops

VISION = 576
PREFIX_IDS = 2  # BOS and the separator of a view's prefix, which only the compression sees
FASTV_LAYER = 2  # K of FastV's own runs
TEXTS, TOKENS = (34, 60, 114, 512), (1, 2, 8, 64)


def _llama(layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
    )


SHAPES = {
    "7B": _llama(32, 4096, 11008, 32, 32, 32_000),  # Vicuna-7B
    "13B": _llama(40, 5120, 13824, 40, 40, 32_000),  # Vicuna-13B
    "34B": _llama(60, 7168, 20480, 56, 8, 64_000),  # Yi-34B
}
TOWER = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
)


@dataclass(frozen=True)
class Cost:
    """One line: storage in bytes, operations in FLOP."""

    text: int  # tokens
    n: int
    full_bytes: int
    voco_bytes: int
    none: float
    full: float
    voco: float
    fastv: float  # without a cache; N of the vision tokens stay after layer K
    compress: float  # once per image, and not part of another column


def answer_cost(config: Any, text: int, n: int) -> Cost:
    """The cost of `text` tokens without a cache, with all 576 vision tokens cached, and with N <voco> cached."""
    image = image_flops(config, TOWER)
    return Cost(
        text=text,
        n=n,
        full_bytes=cache_bytes(config, VISION, 2),
        voco_bytes=cache_bytes(config, n, 2),
        none=image + read_flops(config, 0, VISION + text, dense=True),
        full=read_flops(config, VISION, text, dense=True),
        voco=read_flops(config, n, text, dense=True),
        fastv=image + fastv_flops(config, VISION + text, VISION - n, FASTV_LAYER, dense=True),
        compress=image + compress_flops(config, VISION + PREFIX_IDS, n),
    )


def matching_lengths(cell: float, counted: Callable[[Cost], float], config: Any = SHAPES["7B"]) -> tuple[int, int]:
    """The shortest and the longest text for which a count, in TFLOP to one decimal, equals the paper's cell."""
    fitting = [text for text in range(1, 1024) if round(counted(answer_cost(config, text, 1)) / 1e12, 1) == cell]
    return fitting[0], fitting[-1]


def efficiency_table() -> str:
    """The table, and a comparison with the paper's."""
    lines = [
        "one image, 576 vision tokens, bf16; TFLOP to the first token, dense attention; saved: against no cache",
        f"{'':5}{'text':>5}{'N':>4}{'full cache':>13}{'VoCo cache':>12}{'saved':>9}{'no cache':>10}{'full':>8}{'VoCo':>8}"
        f"{'full saves':>12}{'VoCo saves':>12}{'to compress':>13}{'FastV':>8}{'FastV saves':>13}",
    ]
    for name, config in SHAPES.items():
        for text in TEXTS:
            for n in TOKENS:
                cost = answer_cost(config, text, n)
                none, full, voco, compress = (flops / 1e12 for flops in (cost.none, cost.full, cost.voco, cost.compress))
                lines.append(
                    f"{name:5}{text:5}{n:4}{cost.full_bytes / 1e6:10.1f} MB{cost.voco_bytes / 1e6:9.3f} MB"
                    f"{1 - cost.voco_bytes / cost.full_bytes:9.2%}{none:10.2f}{full:8.3f}{voco:8.3f}"
                    f"{1 - full / none:12.1%}{1 - voco / none:12.1%}{compress:13.2f}"
                    f"{cost.fastv / 1e12:8.2f}{1 - cost.fastv / cost.none:13.1%}"
                )
    return "\n".join([*lines, paper_note()])


def paper_note() -> str:
    """Why no single text length gives all of the paper's cells."""
    columns = {"without a cache": (9.6, "none"), "with the full cache": (1.2, "full"), "with VoCo": (0.5, "voco")}
    needs = []
    for column, (cell, name) in columns.items():
        first, last = matching_lengths(cell, lambda cost, name=name: float(getattr(cost, name)))  # type: ignore[misc]
        needs.append(f"{cell} TFLOP {column} needs {first} to {last} text tokens")
    cost = answer_cost(SHAPES["7B"], 34, 1)
    return (
        f"The paper's cells at 7B cannot all hold: {', '.join(needs)}, and at one length the two caches differ by only "
        f"{(cost.full - cost.voco) / 34 / 1e9:.2f} GFLOP per text token, the attention to 575 rows. Its -94.8 % is that of 34 "
        f"text tokens; its 302.4 MB is 576 times a rounded 0.525, while the cache has {cost.full_bytes:,} bytes."
    )


if __name__ == "__main__":
    print(efficiency_table())
