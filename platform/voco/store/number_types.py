"""Number types of keys and values in a frame cache, as file metadata names them. No pyarrow: `voco plan` does without it."""

from __future__ import annotations

from collections.abc import Sequence

NUMBER_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
SCALED_LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest number of types that are stored with scales
SCALE_BYTES = 4  # fp32
FRAME_GROUP_BYTES = 16 << 20  # of keys and values in one row group of a frame cache


def frame_tensor_bytes(shape: Sequence[int], dtype: str) -> tuple[int, int]:
    """Bytes of a frame's keys (D, H, N, E), and of their scales, one for each layer and head; the values have as many."""
    layers, heads, tokens, width = shape
    scales = layers * heads * SCALE_BYTES if dtype in SCALED_LIMITS else 0
    return layers * heads * tokens * width * NUMBER_BYTES[dtype], scales
