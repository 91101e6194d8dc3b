"""`make bench-access`: what training reads and tokenises over what it uses, at 8 and 64 workers, on LLaVA-665k's shape.

The real sampler, batches and feature store of this build and of the earlier one run over one epoch of all 8 workers and of
8 of the 64. Row groups are generated when they are read, features are counted and not stored: 1.18 MB an image, as at 7B. The
earlier build's read-ahead is not counted. Before that, both orders are checked: each sample is used exactly once an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

SLOTS, WIDTH = 576, 1024
IMAGE_BYTES = SLOTS * WIDTH * 2  # fp16
ENCODED_BYTES = 100 << 10  # of an image of COCO; 8 MiB of them are a row group
ROW_GROUP_BYTES = 8 << 20  # of features, in the earlier build
GLOBAL_BATCH, WORLDS = 128, (8, 64)


class Tables:
    """LLaVA-665k's samples as row groups: conversations about an image in one row, texts between."""

    def __init__(self) -> None:
        from mix665k import MIX

        draw = np.random.default_rng(665)
        images: dict[str, np.ndarray] = {}
        for source in MIX.values():
            if source.images:
                drawn = draw.integers(0, source.images, source.rows) if source.rows > source.images else np.arange(source.rows)
                counts = images.setdefault(source.folder, np.zeros(source.images, dtype=np.int64))
                counts += np.bincount(drawn, minlength=source.images)
        with_image = np.concatenate(list(images.values()))
        texts = np.zeros(MIX["sharegpt"].rows, dtype=np.int64)  # conversations of a row; 0: one, without an image
        self.counts = draw.permutation(np.concatenate([with_image[with_image > 0], texts]))
        in_group = np.cumsum(self.counts > 0) // (ROW_GROUP_BYTES // ENCODED_BYTES)
        self.starts = np.append(np.searchsorted(in_group, np.arange(in_group[-1] + 1)), len(self.counts))
        totals = np.cumsum(np.append(0, np.maximum(1, self.counts)))
        self.sizes = tuple(np.diff(totals[self.starts]).tolist())
        self.owners = (0,) * len(self.sizes)

    def read(self, group: int, columns: Any = None) -> list[dict[str, Any]]:
        """The rows of a row group, as the product's reader returns them."""
        rows = []
        for row in range(self.starts[group], self.starts[group + 1]):
            media = [{"sha256": f"{row:064x}", "width": 640, "height": 480}] if self.counts[row] else []
            turns: list[dict[str, str]] = []
            talk = [{"turns": turns} for _ in range(max(1, self.counts[row]))]
            rows.append({"sample_id": str(row), "media": media, "conversations": talk})
        return rows

    def tables(self, columns: Any, groups: Iterable[int]) -> Iterator[tuple[int, Any]]:
        for group in groups:
            yield group, SimpleNamespace(to_pylist=lambda group=group: self.read(group))

    def address(self, group: int) -> tuple[str, int]:
        return "part", group


class Value:
    """The features of one image, or a row group of them: they have a size and no bytes."""

    def __init__(self, images: int = 1) -> None:
        self.nbytes = images * IMAGE_BYTES

    def reshape(self, *shape: int) -> np.ndarray:
        return np.zeros((1, 1, 1), dtype=np.float16)

    def combine_chunks(self) -> Value:
        return self

    def __getitem__(self, row: int) -> Any:
        return SimpleNamespace(as_buffer=lambda: b"\0\0")


def collated(samples: list[Any], features_of: Callable[[str], Any], *_: Any) -> Any:
    """In place of a batch: its images are taken from the store."""
    for sample in samples:
        for name in sample.media:
            features_of(name)
    return SimpleNamespace(sample_ids=[sample.sample_id for sample in samples])


def in_one_batch(lengths: list[int], count: int) -> list[list[int]]:
    return [list(range(len(lengths)))]


class Sample(SimpleNamespace):
    """A sample without tokens."""

    def __len__(self) -> int:
        return 1


def current_build(tables: Tables, counts: Counter[str]) -> tuple[Any, Callable[[int], Callable[[Any], Any]]]:
    """This build: the rows of an epoch, and for a world the function with which a new worker takes rows."""
    from voco.precompute.feature_store import FeatureStore
    from voco.store.row_group_cache import LIMIT_BYTES, RowGroupCache
    from voco.train import batches
    from voco.train.sampler import TableMix, epoch_order, live_groups
    from voco.train.worker_model import FEATURE_BYTES

    class Counted(FeatureStore):
        """The store without its index: an image is its number."""

        def __init__(self, limit: int) -> None:
            self.shape, self.anyres = (1, 1), False
            self._values: RowGroupCache[int] = RowGroupCache(self._read, limit)
            self._loaded: dict[int, Any] = {}

        def load(self, names: Iterable[str]) -> None:  # the threads of the store count the same and take longer
            self._loaded = {position: self._values.get(position) for position in map(self._position, names)}

        def _position(self, sha256: str) -> int:
            return int(sha256, 16)

        def _read(self, position: int) -> Any:
            counts["bytes"] += IMAGE_BYTES
            return Value()

    patch(batches, counts, "build_sample", "split_evenly", "filler_sample")
    model = SimpleNamespace(tokenizer=None, layout=SimpleNamespace(vision_slots=SLOTS), feature_width=WIDTH)
    block = SimpleNamespace(share_vision=False, max_tokens=2048)
    order = epoch_order(TableMix(tables.sizes, tables.owners, (1.0,)), 0, 0, GLOBAL_BATCH)

    def worker(world: int) -> Callable[[Any], Any]:
        features: Any = Counted(max(LIMIT_BYTES, FEATURE_BYTES // world))
        stand_in: Any = (tables, features, model, block, None, live_groups(GLOBAL_BATCH, world))
        data = batches.ImageBatches(*stand_in)
        return lambda rows: data.micro_batches(rows, 1)

    return order.rows, worker


def earlier_build(tables: Tables, counts: Counter[str]) -> tuple[Any, Callable[[int], Callable[[Any], Any]]]:
    """The earlier build (commit 134c529), likewise."""
    from collections import OrderedDict

    from voco.features import FeatureStore  # type: ignore[import-not-found]
    from voco.train.order import Mix, epoch_order  # type: ignore[import-not-found]

    from voco.train import data as batches  # type: ignore[attr-defined]

    in_group = ROW_GROUP_BYTES // IMAGE_BYTES
    with_image = np.flatnonzero(tables.counts > 0)
    numbers = {int(row): number for number, row in enumerate(with_image)}

    class Index:
        def __contains__(self, sha256: str) -> bool:
            return True

        def __getitem__(self, sha256: str) -> tuple[int, int, int]:
            number = numbers[int(sha256, 16)]
            return 0, number // in_group, number % in_group

    def read_row_group(group: int, columns: list[str]) -> dict[str, Value]:
        counts["bytes"] += in_group * IMAGE_BYTES
        return {"features": Value(in_group)}

    patch(batches, counts, "build", "deal", "filler")
    model = SimpleNamespace(tokenizer=None, layout=SimpleNamespace(vision_slots=SLOTS), feature_width=WIDTH)
    block = SimpleNamespace(share_vision=False, max_tokens=2048)
    order = epoch_order(Mix(tables.sizes, tables.owners, (1.0,)), 0, 0, GLOBAL_BATCH)

    def worker(world: int) -> Callable[[Any], Any]:
        features = FeatureStore.__new__(FeatureStore)
        features.index, features.shape, features.anyres = Index(), (1, 1), False
        features.files = [SimpleNamespace(read_row_group=read_row_group)]
        vars(features).update({"limit": 1 << 30, "held": OrderedDict(), "held_bytes": 0})
        data = batches.ImageBatches(tables, features, model, block)
        return lambda rows: data.passes(rows, 1)

    return order.rows, worker


def patch(module: Any, counts: Counter[str], build: str, split: str, filler: str) -> None:
    """Tokenising is counted, batches are not built."""

    def build_counted(sample_id: str, conversations: list[Any], media: list[str], *_: Any, **__: Any) -> Sample:
        counts["conversations"] += len(conversations)
        return Sample(sample_id=sample_id, media=media, cut=0)

    setattr(module, build, build_counted)
    setattr(module, split, in_one_batch)
    setattr(module, filler, lambda layout: Sample(sample_id="", media=[], cut=0))
    module.collate = collated


def simulate(build: str, simulated: int) -> dict[str, float]:
    """Bytes and conversations over what an epoch uses, by the number of workers."""
    tables, counts = Tables(), Counter[str]()
    rows, worker = (current_build if build == "current" else earlier_build)(tables, counts)
    flat = rows.reshape(-1, 2)
    flat = flat[flat[:, 0] >= 0]
    keys = np.unique(flat[:, 0] * (1 << 32) + flat[:, 1])
    if len(flat) != len(keys) or len(keys) != sum(tables.sizes):
        raise SystemExit(f"{build}: an epoch does not use each sample once")
    used = {"bytes": int((tables.counts > 0).sum()) * IMAGE_BYTES, "conversations": sum(tables.sizes)}
    result: dict[str, float] = {"images": used["bytes"] / IMAGE_BYTES, "samples": len(keys), "row_groups": len(tables.sizes)}
    for world in WORLDS:
        counts.clear()
        ranks = range(0, world, world // min(world, simulated))
        share = GLOBAL_BATCH // world
        for rank in ranks:
            take = worker(world)
            for step in range(len(rows)):
                take(rows[step, rank * share : (rank + 1) * share])
        scale = world / len(ranks)
        result[f"bytes_{world}"] = counts["bytes"] * scale / used["bytes"]
        result[f"tokenised_{world}"] = counts["conversations"] * scale / used["conversations"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulate", choices=["current", "earlier"])
    parser.add_argument("--workers", type=int, default=8, help="of each number of workers, those that are run, evenly spaced")
    options = parser.parse_args()
    if options.simulate:
        print(json.dumps(simulate(options.simulate, options.workers)))
        return
    from earlier import EARLIER, run, source
    from side_by_side import write

    load = os.getloadavg()[0]
    current = json.loads(run("access.py", "--simulate", "current", "--workers", options.workers).splitlines()[-1])
    print(f"this build: {current}", flush=True)
    before = json.loads(run("access.py", "--simulate", "earlier", "--workers", options.workers, folder=source()).splitlines()[-1])
    names = [f"{what}_{world}" for what in ("bytes", "tokenised") for world in WORLDS]
    own, peer = ({name: result[name] for name in names} for result in (current, before))
    work = (
        f"one epoch of {current['samples']:,.0f} conversations about {current['images']:,.0f} images in "
        f"{current['row_groups']:,.0f} row groups, share_vision false, global batch {GLOBAL_BATCH}: read over used"
    )
    ratio = {f"{EARLIER}, {name}": peer[name] / own[name] for name in names}
    write("access", work, own, {f"commit {EARLIER}": peer}, ratio, load, figures=own)


if __name__ == "__main__":
    sys.exit(main())
