"""Vision features read by image hash."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voco.errors import Refused
from voco.store import parquet, storage


class FeatureStore:
    """Reads features by image hash; the latest row groups stay in memory up to `limit` bytes."""

    def __init__(self, uri: str, limit: int = 1 << 30) -> None:
        self.uri = uri
        folder = storage.join(uri, "features")
        self.files = [parquet.open_parquet(storage.join(folder, name)) for name in storage.list_names(folder)]
        if not self.files:
            raise Refused(f"inputs.features: {uri} holds no features")
        stated = {file.schema_arrow.metadata[b"voco.features"] for file in self.files}
        if len(stated) > 1:
            raise Refused(f"inputs.features: {uri} holds features of {len(stated)} towers")
        facts = json.loads(stated.pop())
        self.shape: tuple[int, int] = (facts["shape"][0], facts["shape"][1])
        self.tower: str = facts["tower"]
        self.anyres = facts["config"].get("grid_pinpoints") is not None
        self.index: dict[str, tuple[int, int, int]] = {}
        for number, file in enumerate(self.files):
            for group in range(file.num_row_groups):
                for row, sha256 in enumerate(file.read_row_group(group, columns=["sha256"])["sha256"].to_pylist()):
                    self.index[sha256] = (number, group, row)
        self.limit = limit
        self.held: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self.held_bytes = 0

    def __call__(self, sha256: str) -> Tensor:
        """(V, C) fp16 of one image, or (T, V, C) of its tiles. Raises KeyError for an image that the table does not hold."""
        if sha256 not in self.index:
            raise KeyError(f"no features for image {sha256}; the features job must read the same samples")
        number, group, row = self.index[sha256]
        if (number, group) not in self.held:
            column = self.files[number].read_row_group(group, columns=["features"])["features"].combine_chunks()
            self.held[(number, group)] = column
            self.held_bytes += column.nbytes
            while self.held_bytes > self.limit and len(self.held) > 1:
                self.held_bytes -= self.held.popitem(last=False)[1].nbytes
        self.held.move_to_end((number, group))
        data = np.frombuffer(self.held[(number, group)][row].as_buffer(), dtype=np.float16).reshape(-1, *self.shape)
        return torch.from_numpy((data if self.anyres else data[0]).copy())


def check_tower(features: FeatureStore, wanted: str) -> None:
    """Refuse features of another tower or preprocessing than a model's (`preprocessing` of its config)."""
    if features.tower != wanted:
        raise Refused(
            f"inputs.features: {features.uri} was made by tower {features.tower[:12]}, the model wants {wanted[:12]}: make "
            "them with its own path, layer, fit, decoder and grid_pinpoints"
        )
