"""Keys and values of cached frames as stored numbers, and the metadata of the files of `frame_cache/` (docs/data.md).

Legend: F frames, D layers, H key-value heads, N tokens of a frame, E head width.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from voco.model.cache import VocoCache
from voco.store.number_types import SCALED_LIMITS

# by the names in file metadata
DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn,
}  # fmt: skip
# by the names of `frame_cache.dtype`
STORED = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def dtype_name(dtype: torch.dtype) -> str:
    """As file metadata names it."""
    return str(dtype).removeprefix("torch.")


def quantise(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Keys or values (..., D, H, N, E) in `dtype`, and the scales of scaled types: (..., D, H) fp32, one of each layer and head.

    int8: round(x / scale), ties to even, scale = max|x| / 127, so no number moves by more than scale / 2.
    float8_e4m3fn (arXiv 2209.05433): the nearest of x / scale, scale = max|x| / 448, so a number moves by at most 2^-4 of itself,
    or by scale * 2^-10 where that is more. Other types: torch's cast. Raises ValueError for numbers that are not finite.
    """
    limit = SCALED_LIMITS.get(dtype_name(dtype))
    if limit is None:
        return numbers.to(dtype), None
    exact = numbers.float()
    scales = exact.abs().amax((-2, -1)) / limit
    if not bool(scales.isfinite().all()):
        raise ValueError(f"keys or values that are not finite cannot be stored as {dtype_name(dtype)}")
    # clamped: a quotient may round to more than the limit, which wraps in int8 and is no number in float8
    quotients = (exact / torch.where(scales > 0, scales, 1.0)[..., None, None]).clamp_(-limit, limit)
    return (quotients.round_() if dtype == torch.int8 else quotients).to(dtype), scales


def dequantise(stored: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers that `quantise` stored, (..., D, H, N, E), in `dtype`."""
    if scales is None:
        return stored.to(dtype)
    return (stored.float() * scales[..., None, None]).to(dtype)


def cache_metadata(cache: VocoCache, rope: dict[str, Any], stored: torch.dtype) -> str:
    """File metadata of `frame_cache/` as JSON: all that must match before a frame is read, its shape (D, H, N, E), and the
    number types: `dtype` in the file, `model_dtype` of the compressor, in which readers get the numbers.
    """
    layers, heads, tokens, width = cache.keys.shape
    facts = {**cache.key.describe(stored, rope), "model_dtype": dtype_name(cache.keys.dtype)}
    return json.dumps({**facts, "shape": [layers, heads, tokens // len(cache.tokens), width]}, sort_keys=True)


def split_frames(joined: Tensor, tokens: int) -> Tensor:
    """(F, D, H, N, E) of the joined keys or values (D, H, F * N, E) of frames of `tokens` tokens; a view."""
    layers, heads, count, width = joined.shape
    return joined.view(layers, heads, count // tokens, tokens, width).permute(2, 0, 1, 3, 4)


def to_column(frames: Tensor) -> pa.FixedSizeBinaryArray:
    """One value of a table's column for each of the F frames: its numbers, row-major, in their own dtype."""
    data = frames.contiguous().cpu().view(torch.uint8).reshape(len(frames), -1).numpy()
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(data.shape[1]), len(data), [None, pa.py_buffer(data)])


def tensor_columns(facts: dict[str, Any]) -> list[str]:
    """The columns of a file with these `facts` that have numbers."""
    return ["keys", "values", *(["keys_scales", "values_scales"] if facts["dtype"] in SCALED_LIMITS else [])]
