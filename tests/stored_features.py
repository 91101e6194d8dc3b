"""A finished `features/` output without Ray, for tests that start their processes themselves."""

from __future__ import annotations

import shapes

from voco.precompute import features
from voco.run import units
from voco.store import index, schemas, storage


def write_features(output: str, samples: list[str]) -> None:
    worker = features.FeatureWorker(output, shapes.TOWER, 8, threads=2)
    count = features.list_images(output, samples, 100)
    for unit in range(count):
        worker(unit, units.WorkList(output).read(unit))
    index.join_pieces(output, count, schemas.FEATURES_INDEX)
    assert storage.list_names(f"{output}/features")
