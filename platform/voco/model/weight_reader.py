"""Reads one safetensors file without having it in memory: tensors that map the file, and slices of tensors by ranges.

The format, of github.com/huggingface/safetensors: eight bytes, little endian, with the length of a JSON header; the header,
`{name: {dtype, shape, data_offsets}}` with offsets from its end; the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from safetensors.torch import load_file
from torch import Tensor

from voco.store import storage

# the format's names, in the order in which safetensors 0.8 writes tensors: the widest first
NUMBERS = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_BYTES = 1 << 20  # read at once from storage; headers of a thousand tensors are a tenth of it
PIECE_BYTES = 4 << 20  # of a local file that are read at once to be converted
REQUEST_BYTES = 16 << 20  # of a file in S3 that one request asks for


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes from the file's start

    @property
    def numel(self) -> int:
        return prod(self.shape)


class WeightReader:
    """The tensors of a safetensors file at a local path or `s3://`, by name in the file's order.

    Raises ValueError for a file without a complete header, and for a number type that no weight has.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._filesystem, self._path = storage.filesystem(uri)
        self._is_local = not uri.startswith("s3://")
        head = storage.read_range(self._filesystem, self._path, 0, HEADER_BYTES)
        length = 8 + int.from_bytes(head[:8], "little")
        if length > len(head):
            head += storage.read_range(self._filesystem, self._path, len(head), length - len(head))
        if len(head) < max(8, length):
            raise ValueError(f"{uri}: has no complete safetensors header; copy it again")
        header = json.loads(head[8:length])
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda entry: (entry[1]["data_offsets"], entry[0]))
        unknown = {entry["dtype"] for _, entry in entries} - NUMBERS.keys()
        if unknown:
            raise ValueError(f"{uri}: expected tensors of {list(NUMBERS)}, got {sorted(unknown)}")
        self.tensors = {
            name: StoredTensor(NUMBERS[entry["dtype"]], tuple(entry["shape"]), length + entry["data_offsets"][0])
            for name, entry in entries
        }

    @cached_property
    def _mapped(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self._path)
        return tensors

    def mapped(self, name: str) -> Tensor:
        """A tensor of a local file whose memory is the file's pages: all processes of a machine share them, and writing to it
        gives this process copies and leaves the file as it is.
        """
        return self._mapped[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A complete tensor, converted to `dtype`, in memory that belongs to it alone."""
        stored = self.tensors[name]
        return self.read_slice(name, 0, stored.numel, dtype).view(stored.shape)

    def read_slice(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, 1-D, converted to `dtype`; no other byte of it is read."""
        values = torch.empty(stop - start, dtype=dtype or self.tensors[name].dtype)
        self.read_into(values, name, start)
        return values

    def read_into(self, values: Tensor, name: str, start: int) -> None:
        """Fill `values`, 1-D, contiguous and on the CPU, with the elements from `start` on, converted to its number type."""
        stored = self.tensors[name]
        width, count = stored.dtype.itemsize, values.numel()
        first = stored.start + start * width
        if stored.dtype == values.dtype and self._is_local:  # straight to where they belong
            self._read_bytes(name, first, values.view(torch.uint8).numpy().data)
            return
        limit = min(count, (PIECE_BYTES if self._is_local else REQUEST_BYTES) // width)
        buffer = bytearray(limit * width)
        for at in range(0, count, max(1, limit)):
            piece = min(limit, count - at)
            self._read_bytes(name, first + at * width, memoryview(buffer)[: piece * width])
            values[at : at + piece] = torch.frombuffer(buffer, dtype=stored.dtype, count=piece)

    def _read_bytes(self, name: str, start: int, into: memoryview) -> None:
        """Fill a buffer from the file's byte `start` on. Raises ValueError where the file ends before."""
        if self._is_local:
            with open(self._path, "rb", buffering=0) as file:
                file.seek(start)
                done = 0
                while done < len(into) and (got := file.readinto(into[done:])):
                    done += got
        else:
            data = storage.read_range(self._filesystem, self._path, start, len(into))
            done = len(data)
            into[:done] = data
        if done < len(into):
            raise ValueError(f"{self.uri}: is cut inside {name}; copy it again")
