"""Vision features of every unique image, once: the frozen tower runs here and never again.

Table `features/`: sha256 of the encoded image and (V, C) fp16, row-major; under anyres (T, V, C), T by the image's size. File
metadata names tower and preprocessing.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from voco import rows, storage, work
from voco.errors import Refused
from voco.loader import LIST, PixelLoader
from voco.model import vision_tower
from voco.work import part


def unique_images(samples: list[str]) -> Iterator[dict[str, Any]]:
    """Every image of the `samples/` tables once, where it first stands: rows of `LIST`."""
    seen: set[str] = set()
    for uri in samples:
        folder = storage.join(uri, "samples")
        for name in storage.names(folder):
            place = storage.join(folder, name)
            with rows.open_parquet(place) as file:
                for group in range(file.num_row_groups):
                    held = file.read_row_group(group, columns=["modality", "media.list.element.sha256"]).to_pylist()
                    for row, sample in enumerate(held):
                        media = sample["media"] if sample["modality"] == "image" else []
                        for medium, one in enumerate(media or []):
                            if one["sha256"] not in seen:
                                seen.add(one["sha256"])
                                yield {"sha256": one["sha256"], "part": place, "group": group, "row": row, "medium": medium}


class FeatureWorker:
    """Computes the features of one unit's images, `batch` at a time, while `threads` threads decode the next ones."""

    def __init__(self, output: str, tower: dict[str, Any], batch: int, threads: int) -> None:
        self.output, self.batch, self.threads = output, batch, threads
        self.tower = vision_tower.pretrained(tower)
        if torch.cuda.is_available():
            self.tower.cuda()
        vision_slots, width = self.tower.shape
        facts = {"dtype": "float16", "shape": [vision_slots, width], "tower": self.tower.identity, "config": tower}
        self.metadata = {"voco.features": json.dumps(facts, sort_keys=True)}

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        names: list[str] = []
        made: list[bytes] = []
        bad: list[str] = []
        for batch in PixelLoader(listed.to_pylist(), self._tiles, self.batch, self.threads).batches():
            names += batch.names
            bad += batch.bad
            if batch.names:
                seen = torch.cat([self.tower(some).cpu() for some in torch.split(batch.pixels, self.batch)])
                made += [one.numpy().tobytes() for one in torch.split(seen, batch.views)]
        table = pa.table({"sha256": names, "features": pa.array(made, pa.large_binary())}, schema=rows.FEATURES)
        groups = (table.slice(a, b - a) for a, b in rows.slices_by_bytes([len(one) for one in made]))
        entry = rows.write_table(part(self.output, "features", unit), groups, rows.FEATURES, self.metadata)
        return {"tables": {"features": [entry]}, "counts": {"read": listed.num_rows, "written": len(made)}, "bad": bad}

    def _tiles(self, image: bytes) -> Tensor:
        return self.tower.tiles(image)[0]


def write_list(output: str, samples: list[str], unit_images: int) -> int:
    """The work list of a features job; returns the number of units."""
    return work.write_list(output, work.cut(unique_images(samples), unit_images, LIST), LIST)


class FeatureStore:
    """Reads features by image hash; the latest row groups stay in memory up to `limit` bytes."""

    def __init__(self, uri: str, limit: int = 1 << 30) -> None:
        self.uri = uri
        folder = storage.join(uri, "features")
        self.files = [rows.open_parquet(storage.join(folder, name)) for name in storage.names(folder)]
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
