"""Vision features of every unique image, once: the frozen tower runs here and never again.

Table `features/`: sha256 of the encoded image and (V, C) fp16, row-major; under anyres (T, V, C), T by the image's size. File
metadata names tower and preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from voco.model.vision.tower import load_tower
from voco.precompute.pixel_loader import IMAGE_ADDRESS, PixelLoader
from voco.run import units
from voco.run.units import part_uri
from voco.store import parquet, schemas, storage


def unique_images(samples: list[str]) -> Iterator[dict[str, Any]]:
    """Every image of the `samples/` tables once, where it first stands: rows of `LIST`."""
    seen: set[str] = set()
    for uri in samples:
        folder = storage.join(uri, "samples")
        for name in storage.list_names(folder):
            place = storage.join(folder, name)
            with parquet.open_parquet(place) as file:
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
        self.tower = load_tower(tower)
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
        table = pa.table({"sha256": names, "features": pa.array(made, pa.large_binary())}, schema=schemas.FEATURES)
        groups = (table.slice(a, b - a) for a, b in parquet.slices_by_bytes([len(one) for one in made]))
        entry = parquet.write_table(part_uri(self.output, "features", unit), groups, schemas.FEATURES, self.metadata)
        return {"tables": {"features": [entry]}, "counts": {"read": listed.num_rows, "written": len(made)}, "bad": bad}

    def _tiles(self, image: bytes) -> Tensor:
        return self.tower.tiles(image)[0]


def list_images(output: str, samples: list[str], unit_images: int) -> int:
    """The work list of a features job; returns the number of units."""
    return units.write_work_list(output, units.cut_units(unique_images(samples), unit_images, IMAGE_ADDRESS), IMAGE_ADDRESS)
