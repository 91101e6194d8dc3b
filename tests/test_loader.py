"""The loader gives the list's images in its order, from any place on, each row group read once and the broken ones named."""

from __future__ import annotations

import itertools
import threading
import time

import pyarrow as pa
import pytest
import torch
import world

from voco.model.vision.pixels import llava_pixels
from voco.precompute import features, pixel_loader
from voco.precompute.pixel_loader import PixelLoader
from voco.store import parquet, schemas, storage


def pixels(data: bytes) -> torch.Tensor:
    return llava_pixels(data, 16, (0, 0, 0))


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> list[dict]:
    """23 images in two parts of several row groups, some rows without one; the one at place 7 is no image."""
    output = str(tmp_path_factory.mktemp("samples"))
    made = world.sample_rows(29)
    [row for row in made if row["media"]][7]["media"][0]["bytes"] = b"no image"
    for part, some in enumerate((made[:17], made[17:])):
        groups = (pa.Table.from_pylist(some[start : start + 4], schema=schemas.SAMPLES) for start in range(0, len(some), 4))
        parquet.write_table(storage.join(output, "samples", f"part-{part:05d}.parquet"), groups, schemas.SAMPLES)
    found = list(features.unique_images([output]))
    assert len(found) == 23
    return found


def read(listed, threads: int, start: int = 0, batch: int = 5) -> list[pixel_loader.PixelBatch]:
    return list(PixelLoader(listed, pixels, batch, threads).batches(start))


def test_order_and_pixels_do_not_depend_on_threads(listed):
    one, many = read(listed, 1), read(listed, 4)
    assert [batch.first for batch in one] == [0, 5, 10, 15, 20]
    assert [batch.names for batch in one] == [batch.names for batch in many]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(one, many, strict=True))
    names = [name for batch in many for name in batch.names]
    assert names == [image["sha256"] for place, image in enumerate(listed) if place != 7]
    assert [len(batch.bad) for batch in many] == [0, 1, 0, 0, 0]
    assert many[1].bad[0].startswith(listed[7]["sha256"] + ": cannot identify image")
    by_name = {row["media"][0]["sha256"]: row["media"][0]["bytes"] for row in world.sample_rows(29) if row["media"]}
    for batch in many:
        assert batch.pixels.dtype == torch.uint8
        assert all(torch.equal(made, pixels(by_name[name])) for name, made in zip(batch.names, batch.pixels, strict=True))


def test_it_begins_anywhere_and_reads_nothing_before(listed, monkeypatch):
    whole = read(listed, 2)
    opened: list[tuple[str, int]] = []
    real = pixel_loader._read_group
    monkeypatch.setattr(
        pixel_loader, "_read_group", lambda some: opened.append((some[0]["part"], some[0]["group"])) or real(some)
    )
    rest = read(listed, 2, start=15)
    assert [(batch.first, batch.names) for batch in rest] == [(batch.first, batch.names) for batch in whole[3:]]
    assert opened == list(dict.fromkeys((one["part"], one["group"]) for one in listed[15:]))  # each once, in order
    assert read(listed, 2, start=23) == []


def test_no_more_is_begun_than_two_batches(listed):
    """Whoever takes no further batch keeps the decoders waiting; leaving early ends them."""
    begun = itertools.count()
    counted = [next(begun)]

    def slow(data: bytes) -> torch.Tensor:
        counted[0] = next(begun)
        return pixels(data)

    before = threading.active_count()
    batches = PixelLoader(listed, slow, 3, 2).batches()
    next(batches)
    time.sleep(0.3)
    assert 3 <= counted[0] <= 3 + 2 * 3
    batches.close()
    assert threading.active_count() == before
