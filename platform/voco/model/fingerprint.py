"""The hash of weights, which names a compressor: a cache can be read only with the weights that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


class WeightHash:
    """sha256 over the sorted lines `name dtype shape sha256-of-the-bytes` (docs/method.md, Compressor), tensor by tensor."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        self._lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}")

    def hexdigest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """The `WeightHash` of tensors by name."""
    digest = WeightHash()
    for name, tensor in named:
        digest.add(name, tensor)
    return digest.hexdigest()
