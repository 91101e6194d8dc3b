"""Keys and values of cached frames as bytes, and the metadata of the files of `frame_cache/` (docs/data.md)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voco.model.cache import VocoCache

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def cache_metadata(cache: VocoCache, rope: dict[str, Any]) -> str:
    """File metadata of `frame_cache/` as JSON: all that must match before a frame is read, and its shape (D, H, N, E)."""
    layers, heads, tokens, width = cache.keys.shape
    facts = {**cache.key.describe(cache.keys.dtype, rope), "shape": [layers, heads, tokens // len(cache.tokens), width]}
    return json.dumps(facts, sort_keys=True)


def tensor_to_bytes(tensor: Tensor) -> bytes:
    """The tensor's numbers, row-major, in their own dtype."""
    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def tensor_from_bytes(data: list[bytes], facts: dict[str, Any]) -> Tensor:
    """(F, D, H, N, E) of F frames' keys or values. `facts` is the decoded `cache_metadata`."""
    flat = torch.from_numpy(np.frombuffer(b"".join(data), dtype=np.uint8).copy())
    return flat.view(DTYPES[facts["dtype"]]).view(len(data), *facts["shape"])
