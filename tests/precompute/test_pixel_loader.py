"""The loader gives the list's images in order, from any index on; each row group is read once, and damaged images are named."""

from __future__ import annotations

import itertools
import threading
import time

import pyarrow as pa
import pytest
import torch
import world

from voco.model.vision.pixels import llava_pixels
from voco.precompute import pixel_loader
from voco.precompute.pixel_loader import PixelBatch, PixelLoader
from voco.store import parquet, schemas, storage
from voco.store.samples import unique_images


def pixels(data: bytes) -> torch.Tensor:
    return llava_pixels(data, 16, (0, 0, 0))


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> list[dict]:
    """23 images in two parts of several row groups, some rows without an image; the image at index 7 is damaged."""
    output = str(tmp_path_factory.mktemp("samples"))
    rows = world.sample_rows(29)
    [row for row in rows if row["media"]][7]["media"][0]["bytes"] = b"no image"
    entries = []
    for part, in_part in enumerate((rows[:17], rows[17:])):
        groups = (pa.Table.from_pylist(in_part[start : start + 4], schema=schemas.SAMPLES) for start in range(0, len(in_part), 4))
        entries.append(parquet.write_table(storage.join(output, "samples", f"part-{part:05d}.parquet"), groups, schemas.SAMPLES))
    world.write_samples_index(output, entries)
    images = list(unique_images([output]))
    assert len(images) == 23
    return images


def read(listed, threads: int, start: int = 0, batch: int = 5) -> list[PixelBatch]:
    return list(PixelLoader(listed, pixels, batch, threads).batches(start))


def test_order_and_pixels_do_not_depend_on_threads(listed):
    single, four = read(listed, 1), read(listed, 4)
    assert [batch.first for batch in single] == [0, 5, 10, 15, 20]
    assert [batch.names for batch in single] == [batch.names for batch in four]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(single, four, strict=True))
    names = [name for batch in four for name in batch.names]
    assert names == [image["sha256"] for index, image in enumerate(listed) if index != 7]
    assert [len(batch.bad) for batch in four] == [0, 1, 0, 0, 0]
    assert four[1].bad == [(listed[7]["sha256"], "unsupported_format: begins with b'no image'")]
    by_name = {row["media"][0]["sha256"]: row["media"][0]["bytes"] for row in world.sample_rows(29) if row["media"]}
    for batch in four:
        assert batch.pixels.dtype == torch.uint8
        assert all(torch.equal(image, pixels(by_name[name])) for name, image in zip(batch.names, batch.pixels, strict=True))


def test_it_starts_anywhere_and_reads_nothing_before(listed, monkeypatch):
    batches = read(listed, 2)
    opened: list[tuple[str, int]] = []
    original = pixel_loader.read_images

    def spy(images):
        opened.append((images[0]["part"], images[0]["group"]))
        return original(images)

    monkeypatch.setattr(pixel_loader, "read_images", spy)
    rest = read(listed, 2, start=15)
    assert [(batch.first, batch.names) for batch in rest] == [(batch.first, batch.names) for batch in batches[3:]]
    assert opened == list(dict.fromkeys((image["part"], image["group"]) for image in listed[15:]))  # each once, in order
    assert read(listed, 2, start=23) == []


def test_at_most_two_batches_are_decoded_ahead(listed):
    """A consumer that takes no further batch keeps the decoders waiting; leaving early ends them."""
    started = itertools.count()
    counted = [next(started)]

    def count(data: bytes) -> torch.Tensor:
        counted[0] = next(started)
        return pixels(data)

    before = threading.active_count()
    batches = PixelLoader(listed, count, 3, 2).batches()
    next(batches)
    time.sleep(0.3)
    assert 3 <= counted[0] <= 3 + 2 * 3
    batches.close()
    assert threading.active_count() == before
