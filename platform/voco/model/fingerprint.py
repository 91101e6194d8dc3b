"""The hash of weights, which names a compressor: a cache can be read only with the weights that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the sorted lines `name dtype shape sha256-of-the-bytes` (docs/method.md, Compressor)."""
    lines = []
    for name, tensor in named:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
