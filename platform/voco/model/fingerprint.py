"""The hash that names weights: a cache can be read if and only if the weights that made it are these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the sorted lines `name dtype shape sha256-of-the-bytes` (design section 3, Compressor)."""
    lines = []
    for name, tensor in named:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
