"""The `features` job: vision features of every unique image, so that the frozen tower runs once per image.

Table `features/` (docs/data.md): sha256 of the encoded image and (V, C) fp16, row-major; under anyres (T, V, C), T by the image's
size. File metadata names tower and preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from voco.errors import JobFailed
from voco.model.vision.tower import load_tower
from voco.precompute.pixel_loader import PixelLoader
from voco.run import units
from voco.run.units import part_uri
from voco.store import index, parquet, schemas
from voco.store.samples import IMAGE_ADDRESS, unique_images


class FeatureWorker:
    """Computes the features of one unit's images, `batch` at a time, while `threads` threads decode the next ones."""

    def __init__(self, output: str, tower: dict[str, Any], batch: int, threads: int) -> None:
        self.output, self.batch, self.threads = output, batch, threads
        self.tower = load_tower(tower)
        if torch.cuda.is_available():
            self.tower.cuda()
        vision_slots, width = self.tower.shape
        facts = {"dtype": "float16", "shape": [vision_slots, width], "tower": self.tower.identity, "config": tower}
        self.metadata = {schemas.FEATURES_METADATA: json.dumps(facts, sort_keys=True)}

    def __call__(self, unit: int, listed: pa.Table) -> dict[str, Any]:
        """Write the features of one unit, given as rows of IMAGE_ADDRESS, and their index. Returns the unit's record."""
        names: list[str] = []
        lengths: list[int] = []
        bad: list[str] = []
        footer: list[pq.FileMetaData] = []

        def groups() -> Iterator[pa.Table]:
            """An image each: its value is then the end of a column chunk, which one ranged read fetches."""
            for sha256, features in self._features(listed, bad):
                names.append(sha256)
                lengths.append(len(features))
                yield parquet.to_table([{"sha256": sha256, "features": features}], schemas.FEATURES)

        uri = part_uri(self.output, "features", unit)
        entry = parquet.write_table(uri, groups(), schemas.FEATURES, self.metadata, {"sha256": "PLAIN"}, footer)
        index.write_piece(self.output, unit, index.features_rows(entry, footer[0], names, lengths), self.metadata)
        return {"tables": {"features": [entry]}, "counts": {"read": listed.num_rows, "written": len(names)}, "bad": bad}

    def _features(self, listed: pa.Table, bad: list[str]) -> Iterator[tuple[str, bytes]]:
        """sha256 and value of each image of the list; those that cannot be decoded are added to `bad`."""
        for batch in PixelLoader(listed.to_pylist(), self._tiles, self.batch, self.threads).batches():
            bad += (f"{image.sha256}: {image.error}" for image in batch.bad)
            if batch.names:
                views = torch.cat([self.tower(pixels).cpu() for pixels in torch.split(batch.pixels, self.batch)])
                for sha256, image in zip(batch.names, torch.split(views, batch.views), strict=True):
                    yield sha256, image.numpy().tobytes()

    def _tiles(self, image: bytes) -> Tensor:
        return self.tower.tiles(image)[0]


def list_images(output: str, samples: list[str], unit_images: int) -> int:
    """Write the work list of a features job. Returns the number of units."""
    return units.write_work_list(output, units.cut_units(unique_images(samples), unit_images, IMAGE_ADDRESS), IMAGE_ADDRESS)


def check_decoded(name: str, records: Iterable[dict[str, Any]]) -> None:
    """Raise JobFailed for the job `name` if an image could not be decoded, because training needs its features."""
    bad = [image for record in records for image in record["bad"]]
    if bad:
        raise JobFailed(f"{name}: {len(bad)} images cannot be decoded; ingest with `validate: full` rejects them: {bad[0]}")
