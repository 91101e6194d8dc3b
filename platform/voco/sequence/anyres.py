"""LLaVA-1.6's tiles ("anyres"): an image is seen whole and cut into a grid of squares, chosen by its size. Numpy only.

The rules are those of transformers' LlavaNext, to which tests hold them. Legend: T tiles of an image, the whole image first
and then the grid in raster order; V vision slots of a tile; K slots of an image under LLaVA's own packing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Ints = npt.NDArray[np.int64]
Size = tuple[int, int]  # height and width, in pixels
NEWLINE = -1  # in a packing: the learned vector that ends a row of the grid


class Anyres(BaseModel):
    """What decides an image's tiles; part of a checkpoint's layout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid_pinpoints: tuple[Size, ...]  # the resolutions to choose from, multiples of `tile`
    tile: int  # side of a tile in pixels: what the tower sees

    def resolution(self, size: Size) -> Size:
        """The one that keeps most of the image's pixels, and of those the smallest."""
        return best_resolution(size, self.grid_pinpoints)

    def tiles(self, size: Size) -> int:
        """T of an image."""
        height, width = self.resolution(size)
        return 1 + (height // self.tile) * (width // self.tile)

    def packing(self, size: Size, slots: int) -> Ints:
        """(K,) int64: which of the image's T * V rows of features stands in each slot, or NEWLINE.

        The whole image's V, then the grid's rows as one picture, without those that padding alone covers, a newline behind each.
        """
        return _packing(self, size, slots)


def join_packings(anyres: Anyres | None, sizes: Sequence[Size | None], slots: int) -> Ints | None:
    """The packings of all images, numbered through; an image without a size is one view. None where there is nothing to pack."""
    if anyres is None or not sizes:
        return None
    parts, start = [], 0
    for size in sizes:
        own = np.arange(slots) if size is None else anyres.packing(size, slots)
        parts.append(np.where(own == NEWLINE, NEWLINE, own + start))
        start += slots * (1 if size is None else anyres.tiles(size))
    return np.concatenate(parts)


def best_resolution(size: Size, choices: tuple[Size, ...]) -> Size:
    """transformers' `select_best_resolution`."""
    best, most, least = choices[0], 0, math.inf
    for height, width in choices:
        scale = min(width / size[1], height / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        if kept > most or (kept == most and width * height - kept < least):
            best, most, least = (height, width), kept, width * height - kept
    return best


def fit_inside(size: Size, target: Size) -> Size:
    """Height and width of an image that was resized to fit into `target`, its sides in proportion."""
    tall, wide = target[0] / size[0], target[1] / size[1]
    if wide < tall:
        return min(math.ceil(size[0] * wide), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * tall), target[1])


@lru_cache(maxsize=1 << 10)  # sizes repeat; whoever gets the array must not write to it
def _packing(anyres: Anyres, size: Size, slots: int) -> Ints:
    side = math.isqrt(slots)
    if side * side != slots:
        raise ValueError(f"anyres: {slots} positions of a tile are no square")
    rows, columns = (pixels // anyres.tile for pixels in anyres.resolution(size))
    grid = slots + np.arange(rows * columns * slots).reshape(rows, columns, side, side)
    picture = grid.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    (height, width), (tall, wide) = size, picture.shape
    if width / height > wide / tall:
        padding = (tall - int(round(height * (wide / width), 7))) // 2
        picture = picture[padding : tall - padding]
    else:
        padding = (wide - int(round(width * (tall / height), 7))) // 2
        picture = picture[:, padding : wide - padding]
    lines = np.concatenate([picture, np.full((len(picture), 1), NEWLINE)], axis=1)
    return np.concatenate([np.arange(slots), lines.reshape(-1)])
