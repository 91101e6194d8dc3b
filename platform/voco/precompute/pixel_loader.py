"""Images of `samples/` tables as batches of pixels: row groups read once, decoded on threads ahead of the consumer.

Decoders, the resize and file reads release Python's lock, so threads are enough. Batches come in the order of the list, the same
for any number of threads. A batch says at which index of the list it starts, and a loader can start at any index.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from voco.errors import message_line
from voco.store.part_files import map_ahead
from voco.store.samples import read_images

UNDECODABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on damaged bytes

TASK_IMAGES = 8  # decoded by one task: handing over single images costs a thirtieth of their decoding


class BadImage(NamedTuple):
    """An image that cannot be decoded."""

    sha256: str
    error: str


class PixelBatch(NamedTuple):
    """Consecutive images of the list, without those that cannot be decoded."""

    first: int  # index in the list of the batch's first image
    names: list[str]  # sha256 of each image in `pixels`
    pixels: Tensor  # (F, S, S, 3) uint8, F may be 0
    bad: list[BadImage]  # the others
    views: list[int]  # how many of the F views each image has: 1, or its tiles


class PixelLoader:
    """Batches of `batch` images from a list (rows of `IMAGE_ADDRESS`, row groups together).

    `preprocess` makes (S, S, 3) uint8 of an image, or (T, S, S, 3) of its tiles, on `threads` threads.
    Memory holds at most two row groups of encoded images and two batches of pixels beside the batch in use.
    """

    def __init__(self, listed: Iterable[dict[str, Any]], preprocess: Callable[[bytes], Tensor], batch: int, threads: int) -> None:
        self.listed, self.preprocess, self.batch, self.threads = listed, preprocess, batch, threads

    def batches(self, start: int = 0) -> Iterator[PixelBatch]:
        """Every batch from index `start` of the list on; nothing before it is read."""
        reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(self.threads)
        try:
            images = read_encoded(itertools.islice(self.listed, start, None), reader)
            size = max(1, min(TASK_IMAGES, self.batch // self.threads))
            tasks = iter(lambda: list(itertools.islice(images, size)), [])
            decoded = itertools.chain.from_iterable(map_ahead(decoders, self._decode, tasks, -(-2 * self.batch // size)))
            for number in itertools.count():
                results = list(itertools.islice(decoded, self.batch))
                if not results:
                    return
                yield _to_batch(start + number * self.batch, results)
        finally:
            decoders.shutdown(cancel_futures=True)
            reader.shutdown(cancel_futures=True)

    def _decode(self, images: list[tuple[str, bytes]]) -> list[tuple[str, Tensor | str]]:
        return [(name, self._pixels(data)) for name, data in images]

    def _pixels(self, data: bytes) -> Tensor | str:
        try:
            return self.preprocess(data)
        except UNDECODABLE as error:
            return message_line(error)


def _to_batch(first: int, results: list[tuple[str, Tensor | str]]) -> PixelBatch:
    """A batch from the pixels or the error of each of its images."""
    good = [(name, result) for name, result in results if isinstance(result, Tensor)]
    views = [pixels.reshape(-1, *pixels.shape[-3:]) for _, pixels in good]
    pixels = torch.cat(views) if views else torch.empty(0, dtype=torch.uint8)
    bad = [BadImage(name, result) for name, result in results if isinstance(result, str)]
    return PixelBatch(first, [name for name, _ in good], pixels, bad, [len(view) for view in views])


def read_encoded(listed: Iterable[dict[str, Any]], reader: Executor) -> Iterator[tuple[str, bytes]]:
    """sha256 and encoded bytes of every image of the list, in its order; `reader` reads the next row group ahead."""
    groups = (list(images) for _, images in itertools.groupby(listed, key=lambda image: (image["part"], image["group"])))
    for images in map_ahead(reader, read_images, groups, 2):
        yield from images
