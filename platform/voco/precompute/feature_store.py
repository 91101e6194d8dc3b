"""Reads `features/` by image hash, and checks that they are of the model's tower."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from voco.errors import Refused
from voco.store import parquet, schemas, storage
from voco.store.row_group_cache import LIMIT_BYTES, RowGroupCache


class FeatureStore:
    """Features by image hash. Row groups stay in memory up to `limit` bytes.

    Raises Refused for an output without features, and for features of several towers.
    """

    def __init__(self, uri: str, limit: int = LIMIT_BYTES) -> None:
        self.uri = uri
        folder = storage.join(uri, "features")
        self.files = [parquet.open_parquet(storage.join(folder, name)) for name in storage.list_names(folder)]
        if not self.files:
            raise Refused(f"inputs.features: {uri} has no features")
        metadata = {file.schema_arrow.metadata[schemas.FEATURES_METADATA.encode()] for file in self.files}
        if len(metadata) > 1:
            raise Refused(f"inputs.features: {uri} has features of {len(metadata)} towers")
        facts = json.loads(metadata.pop())
        self.shape: tuple[int, int] = (facts["shape"][0], facts["shape"][1])
        self.tower: str = facts["tower"]
        self.anyres = facts["config"].get("grid_pinpoints") is not None
        self.index: dict[str, tuple[int, int, int]] = {}  # file, row group, row
        for number, file in enumerate(self.files):
            for group in range(file.num_row_groups):
                for row, sha256 in enumerate(file.read_row_group(group, columns=["sha256"])["sha256"].to_pylist()):
                    self.index[sha256] = (number, group, row)
        self.groups: RowGroupCache[int] = RowGroupCache(self._read_group, limit)

    def __call__(self, sha256: str) -> Tensor:
        """(V, C) fp16 of one image, or (T, V, C) of its tiles. Raises KeyError for an image that the table lacks."""
        if sha256 not in self.index:
            raise KeyError(f"no features for image {sha256}; the features job must read the same samples")
        number, group, row = self.index[sha256]
        data = np.frombuffer(self.groups.get(number, group)[row].as_buffer(), dtype=np.float16).reshape(-1, *self.shape)
        return torch.from_numpy((data if self.anyres else data[0]).copy())

    def _read_group(self, number: int, group: int) -> pa.Array:
        return self.files[number].read_row_group(group, columns=["features"])["features"].combine_chunks()


def check_tower(features: FeatureStore, preprocessing: str) -> None:
    """Refuse features of another tower or preprocessing than a model's (`preprocessing` of its config)."""
    if features.tower != preprocessing:
        raise Refused(
            f"inputs.features: expected features of tower {preprocessing[:12]}, the model's, got {features.tower[:12]} in "
            f"{features.uri}; make them with this version and the model's path, layer, fit, decoder and grid_pinpoints"
        )
