"""LLaVA-1.6's tiles ("anyres"): the complete image, and a grid of squares that its size chooses. Numpy only.

The rules are those of transformers' LlavaNext; tests check them against it. Legend: T tiles of an image, the complete image
first and then the grid in raster order; V vision slots of a tile; K slots of an image under LLaVA's own packing.
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
    """The rule that cuts an image into tiles; part of a checkpoint's layout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid_pinpoints: tuple[Size, ...]  # the resolutions to choose from, multiples of `tile`
    tile: int  # side of a tile in pixels: what the tower sees

    def resolution(self, size: Size) -> Size:
        """The resolution that keeps most of the image's pixels; of several, the smallest."""
        return best_resolution(size, self.grid_pinpoints)

    def tiles(self, size: Size) -> int:
        """T of an image."""
        height, width = self.resolution(size)
        return 1 + (height // self.tile) * (width // self.tile)

    def packing(self, size: Size, slots: int) -> Ints:
        """(K,) int64: for each slot its row among the image's T * V rows of features, or NEWLINE.

        First the V rows of the complete image; then the grid's rows as one picture, without rows and columns of padding, each
        row followed by a newline.
        """
        return _packing(self, size, slots)


def join_packings(anyres: Anyres | None, sizes: Sequence[Size | None], slots: int) -> Ints | None:
    """The packings of all images, over the rows of all their features; an image without a size is one view. None: no anyres."""
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
    best, best_effective, least_wasted = choices[0], 0, math.inf
    for height, width in choices:
        scale = min(width / size[1], height / size[0])
        effective = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        wasted = width * height - effective
        if effective > best_effective or (effective == best_effective and wasted < least_wasted):
            best, best_effective, least_wasted = (height, width), effective, wasted
    return best


def fit_inside(size: Size, target: Size) -> Size:
    """Height and width of an image that is resized to fit into `target` and keeps its proportions."""
    tall, wide = target[0] / size[0], target[1] / size[1]
    if wide < tall:
        return min(math.ceil(size[0] * wide), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * tall), target[1])


@lru_cache(maxsize=1 << 10)  # sizes repeat; callers must not write to the array
def _packing(anyres: Anyres, size: Size, slots: int) -> Ints:
    side = math.isqrt(slots)
    if side * side != slots:
        raise ValueError(f"anyres: the {slots} positions of a tile do not form a square")
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
