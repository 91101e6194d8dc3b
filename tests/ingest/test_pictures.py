"""Unusual images from the source to the pixels of a tower: ingest, the samples table, a features job's loader, the report."""

from __future__ import annotations

import base64
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from image.kinds import JPEG_12, JPEG_XL, chunk, encode, ramp, tiff, with_chunks
from ingest.source import image, job, row, table, write
from PIL import Image
from torch import nn

import pipelines
from voco.model.vision.tower import CLIP, VisionTower
from voco.precompute.pixel_loader import PixelLoader
from voco.report.pictures import picture
from voco.store.samples import unique_images

HALF = (slice(None), slice(0, 14)), (slice(None), slice(18, 32))  # left and right of 32 x 32 pixels, without the edge between


def half_transparent(mode: str) -> Image.Image:
    """Black ink on transparent black: the right half shows."""
    both = Image.new(mode, (64, 64), (0,) * len(mode))
    both.paste((0,) * (len(mode) - 1) + (255,), (32, 0, 64, 64))
    return both


def keyed() -> bytes:
    """An RGB image whose colour (9, 9, 9) is transparent."""
    both = Image.new("RGB", (64, 64), (9, 9, 9))
    both.paste((0, 0, 0), (32, 0, 64, 64))
    return encode(both, "PNG", transparency=(9, 9, 9))


GOOD = {
    "grey.png": encode(Image.fromarray(ramp(256, 256)), "PNG"),
    "grey.tif": encode(Image.fromarray(ramp(256, 256)), "TIFF"),
    "rgba.png": encode(half_transparent("RGBA"), "PNG"),
    "la.png": encode(half_transparent("LA"), "PNG"),
    "rgba.webp": encode(half_transparent("RGBA"), "WEBP", lossless=True),
    "rgba.avif": encode(half_transparent("RGBA"), "AVIF", quality=100),
    "keyed.png": keyed(),
    "text.png": with_chunks(encode(half_transparent("LA"), "PNG"), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3 << 20)))),
}
BAD = {
    "float.tif": encode(Image.fromarray(ramp().astype(np.float32)), "TIFF"),
    "signed.tif": tiff(2, 16, b"\xff\xff\0\x10", sample_format=2),
    "twelve.jpg": JPEG_12,
    "xl.jxl": JPEG_XL,
    "scan.jp2": encode(Image.new("RGB", (8, 8)), "JPEG2000"),
}
CUT = {"cut.avif": GOOD["rgba.avif"][:-40], "cut.png": GOOD["text.png"][:-40]}


@pytest.mark.parametrize("check", ["header", "full"])
def test_from_the_source_to_the_tower(tmp_path: Path, check: str) -> None:
    sources = {**GOOD, **BAD, **CUT, "photo.jpg": image(1)}
    listed = [row(name, name, "<image>\nWhat is it?", "A picture.") for name in sources]
    write(tmp_path, listed, sources)
    done = pipelines.run(job(tmp_path, tmp_path / "out", validate=check, max_reject_share=1.0))
    assert done.counts["rejected"] == {"unsupported_format": len(BAD), "corrupt_media": len(CUT)}
    rejects = {listed[int(reject["source"].split(":")[1])]["image"]: reject for reject in table(tmp_path / "out", "rejects")}
    assert {name for name, reject in rejects.items() if reject["reason"] == "unsupported_format"} == set(BAD)
    samples = {sample["media"][0]["path"]: sample for sample in table(tmp_path / "out", "samples")}
    assert samples.keys() == GOOD.keys() | {"photo.jpg"}
    assert samples["rgba.avif"]["media"][0]["format"] == "avif"
    assert all(samples[name]["media"][0]["bytes"] == data for name, data in GOOD.items()), "as encoded at the source"
    tower = VisionTower(shapes.tower("clip", layer=-2), nn.Conv2d(3, 1, 3), *CLIP)
    names = {sample["media"][0]["sha256"]: name for name, sample in samples.items()}
    seen: dict[str, torch.Tensor] = {}
    for batch in PixelLoader(list(unique_images([str(tmp_path / "out")])), lambda data: tower.tiles(data)[0], 4, 2).batches():
        assert not batch.bad
        seen |= {names[sha256]: pixels.int() for sha256, pixels in zip(batch.names, batch.pixels, strict=True)}
    assert seen.keys() == samples.keys()
    for name, pixels in seen.items():
        shown = _shown(samples[name])
        if name.startswith("grey"):
            assert abs(pixels.float().mean() - 127.5) < 1
            quantiles = torch.quantile(pixels.float(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
            assert (quantiles - torch.tensor([4.0, 63.75, 127.5, 191.25, 251.0])).abs().max() < 5
            assert np.abs(np.quantile(shown, (0, 0.25, 0.5, 0.75, 1)) - (0, 63.75, 127.5, 191.25, 255)).max() < 8
        elif name != "photo.jpg":
            assert pixels[HALF[0]].min() >= 250
            assert pixels[HALF[1]].max() <= 5
            assert (shown[:, :28].min() > 240, shown[:, 36:].max() < 15) == (True, True)


def _shown(sample: dict) -> np.ndarray:
    """The pixels of a sample's image in the report."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture(sample).uri.split(",")[1]))).convert("RGB"))
