"""Reads `features/` by image hash, and checks that they are of the model's tower."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from voco.errors import Refused
from voco.store import index, schemas, storage
from voco.store.row_group_cache import LIMIT_BYTES, RowGroupCache

LENGTH_BYTES = 4  # of a value, before it


class FeatureStore:
    """Features by image hash. Opening reads the index and no part; an image is one ranged read. Values stay in memory up to
    `limit` bytes, with those of the last `load`, and the index takes 56 bytes an image. Thread-safe.

    Raises Refused for an output without an index or without features.
    """

    def __init__(self, uri: str, limit: int = LIMIT_BYTES) -> None:
        self.uri = uri
        table = index.read_table_index(uri, schemas.FEATURES_INDEX)
        facts = index.facts_of(table, schemas.FEATURES_METADATA)
        if facts is None:
            raise Refused(f"inputs.features: {uri} has no features")
        self.shape: tuple[int, int] = (facts["shape"][0], facts["shape"][1])
        self.tower: str = facts["tower"]
        self.anyres = facts["config"].get("grid_pinpoints") is not None
        self.keys = index.Keys(index.fixed_width(table["sha256"]))
        order = self.keys.take_order()
        parts = table["part"].combine_chunks().dictionary_encode()
        self._parts: list[str] = parts.dictionary.to_pylist()
        self._part = parts.indices.to_numpy()[order]
        self._offset = table["offset"].to_numpy()[order]
        self._length = table["length"].to_numpy()[order]
        self._values: RowGroupCache[int] = RowGroupCache(self._read, limit)
        self._loaded: dict[int, np.ndarray] = {}  # of the last `load`, which may be more than the limit

    def __call__(self, sha256: str) -> Tensor:
        """(V, C) fp16 of one image, or (T, V, C) of its tiles. Raises KeyError for an image that the table lacks."""
        position, loaded = self._position(sha256), self._loaded
        values = loaded[position] if position in loaded else self._values.get(position)
        data = values.reshape(-1, *self.shape)
        return torch.from_numpy((data if self.anyres else data[0]).copy())

    def __contains__(self, sha256: str) -> bool:
        return self.keys.position(bytes.fromhex(sha256)) is not None

    def load(self, names: Iterable[str]) -> None:
        """Read the images that are not in memory, several at a time, so that the next calls find them there.

        Raises KeyError for an image that the table lacks.
        """
        self._loaded = self._values.load([self._position(sha256) for sha256 in names])

    def _position(self, sha256: str) -> int:
        position = self.keys.position(bytes.fromhex(sha256))
        if position is None:
            raise KeyError(f"no features for image {sha256}; the features job must read the same samples")
        return position

    def _read(self, position: int) -> np.ndarray:
        """fp16 of one value, and a check of its length before it: PLAIN, little-endian."""
        uri = storage.join(self.uri, "features", self._parts[self._part[position]])
        offset, length = int(self._offset[position]), int(self._length[position])
        fs, path = storage.filesystem(uri)
        data = storage.read_range(fs, path, offset - LENGTH_BYTES, LENGTH_BYTES + length)
        if len(data) != LENGTH_BYTES + length or int.from_bytes(data[:LENGTH_BYTES], "little") != length:
            raise ValueError(f"{uri}: no value of {length} bytes at {offset}: the file is not the one of {schemas.INDEX_FILE}")
        return np.frombuffer(data, dtype=np.float16, offset=LENGTH_BYTES)


def check_tower(features: FeatureStore, preprocessing: str) -> None:
    """Refuse features of another tower or preprocessing than a model's (`preprocessing` of its config)."""
    if features.tower != preprocessing:
        raise Refused(
            f"inputs.features: expected features of tower {preprocessing[:12]}, the model's, got {features.tower[:12]} in "
            f"{features.uri}; make them with this version and the model's path, layer, fit, decoder and grid_pinpoints"
        )
