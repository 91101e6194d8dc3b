"""Features of images without a `features/` table: bytes of `samples/` decoded ahead on threads, then the frozen tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from voco.model.vision.tower import VisionTower
from voco.precompute.pixel_loader import PixelLoader

DECODED_AHEAD = 32  # images of a batch of PixelLoader, which decodes two batches beside the one in use


class LiveFeatures:
    """Features of the images of a list (rows of `IMAGE_ADDRESS`), computed as they are taken, in the order of the list.

    They are rounded to fp16 by the tower itself, as the stored ones are. `threads` threads decode ahead.
    """

    def __init__(self, listed: Sequence[dict[str, Any]], tower: VisionTower, threads: int) -> None:
        self.listed, self.tower = listed, tower
        self.bad: dict[str, str] = {}  # sha256 of each image that could not be decoded so far, and the error
        self._loader = PixelLoader(listed, self._tiles, DECODED_AHEAD, threads)
        self._images = self._decoded()

    def take(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The features of the list's next images, which are `names`: (V, C) fp16, or (T, V, C) of an image's tiles.

        An image that cannot be decoded is left out, and added to `bad`. Raises ValueError for other images than the list's.
        """
        pixels: dict[str, Tensor] = {}
        for expected in names:
            name, image = next(self._images)
            if name != expected:
                raise ValueError(f"expected the list's next image, {name}, got {expected}")
            if isinstance(image, Tensor):
                pixels[name] = image
            else:
                self.bad[name] = image
        if not pixels:
            return {}
        features = torch.split(self.tower(torch.cat(list(pixels.values()))), [len(image) for image in pixels.values()])
        with_tiles = self.tower.anyres is not None
        return {name: image if with_tiles else image[0] for name, image in zip(pixels, features, strict=True)}

    def close(self) -> None:
        """End the threads."""
        self._images.close()

    def _tiles(self, image: bytes) -> Tensor:
        return self.tower.tiles(image)[0]

    def _decoded(self) -> Any:  # a generator, which has `close`
        """sha256, and pixels (T, P, P, 3) or the error, of each image of the list."""
        for batch in self._loader.batches():
            bad = dict(batch.bad)
            good: Iterator[Tensor] = iter(torch.split(batch.pixels, batch.views))
            for image in self.listed[batch.first : batch.first + len(batch.names) + len(batch.bad)]:
                name = image["sha256"]
                yield name, bad[name] if name in bad else next(good)
