"""Writes one safetensors file tensor by tensor, so that no more than one tensor has to be in memory.

The bytes are those of safetensors' own `save_file`: tensors ordered by number type, the widest first, then by name, and a
header that spaces fill up to a multiple of eight bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import IO

import torch
from torch import Tensor

from voco.model.weight_reader import NUMBERS

NAMES = {dtype: name for name, dtype in NUMBERS.items()}  # the format's
ORDER = {dtype: number for number, dtype in enumerate(NAMES)}
Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # number type and shape of tensors, by name


def file_order(kinds: Kinds) -> list[str]:
    """The names in the order in which their tensors are in the file."""
    return sorted(kinds, key=lambda name: (ORDER[kinds[name][0]], name))


def write_weights(
    file: IO[bytes], kinds: Kinds, read: Callable[[str], Tensor], seen: Callable[[str, Tensor], None] | None = None
) -> None:
    """Write tensors of these `kinds`; `read` is called once for each, in the file's order, and gives its values on any device.

    `seen` gets every tensor that is written, on the CPU, so that hashing needs no second reading. Raises ValueError for a tensor
    of another kind.
    """
    names, header, start = file_order(kinds), {}, 0
    for name in names:
        dtype, shape = kinds[name]
        stop = start + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        tensor = read(name).detach().cpu().contiguous()
        if (tensor.dtype, tuple(tensor.shape)) != kinds[name]:
            raise ValueError(f"{name}: expected {kinds[name]}, got {(tensor.dtype, tuple(tensor.shape))}")
        if seen is not None:
            seen(name, tensor)
        file.write(tensor.flatten().view(torch.uint8).numpy().data)
