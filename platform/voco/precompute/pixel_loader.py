"""Images of `samples/` tables as batches of pixels: row groups read once, decoded on threads ahead of whoever takes the batches.

Decoders, the resize and file reads release Python's lock, so threads are enough. Batches come in the order of the list, the same
for any number of threads; a batch says where in the list it starts, and a loader begins anywhere.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from voco.store import parquet

# A list of images, each where it first stands in its tables.
IMAGE_ADDRESS = pa.schema(
    [("sha256", pa.string()), ("part", pa.string()), ("group", pa.int32()), ("row", pa.int32()), ("medium", pa.int32())]
)

BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on bytes that are no whole image

FEW = 8  # images of one task: passing each from thread to thread costs a thirtieth of decoding it

In = TypeVar("In")
Out = TypeVar("Out")


class PixelBatch(NamedTuple):
    """Consecutive images of the list, less those that cannot be decoded."""

    first: int  # place in the list of the first one
    names: list[str]  # sha256 of each image in `pixels`
    pixels: Tensor  # (F, S, S, 3) uint8, F may be 0
    bad: list[str]  # sha256 and error of the others
    views: list[int]  # how many of the F are of each image: 1, or its tiles


class PixelLoader:
    """Batches of `batch` images from a list (rows of `LIST`, groups together), `preprocess`ed on `threads` threads to (S, S, 3)
    uint8, or (T, S, S, 3) of an image's tiles.

    At most two row groups of encoded images and two batches of pixels are held beside the batch that is being used.
    """

    def __init__(self, listed: Iterable[dict[str, Any]], preprocess: Callable[[bytes], Tensor], batch: int, threads: int) -> None:
        self.listed, self.preprocess, self.batch, self.threads = listed, preprocess, batch, threads

    def batches(self, start: int = 0) -> Iterator[PixelBatch]:
        """Every batch from place `start` of the list on; nothing before it is read."""
        reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(self.threads)
        try:
            images = read_encoded(itertools.islice(self.listed, start, None), reader)
            few = max(1, min(FEW, self.batch // self.threads))
            tasks = iter(lambda: list(itertools.islice(images, few)), [])
            decoded = itertools.chain.from_iterable(map_ahead(decoders, self._decode, tasks, -(-2 * self.batch // few)))
            for number in itertools.count():
                some = list(itertools.islice(decoded, self.batch))
                if not some:
                    return
                good = [(name, made) for name, made in some if isinstance(made, Tensor)]
                each = [made.reshape(-1, *made.shape[-3:]) for _, made in good]
                pixels = torch.cat(each) if each else torch.empty(0, dtype=torch.uint8)
                bad = [f"{name}: {made}" for name, made in some if isinstance(made, str)]
                yield PixelBatch(start + number * self.batch, [name for name, _ in good], pixels, bad, [len(one) for one in each])
        finally:
            decoders.shutdown(cancel_futures=True)
            reader.shutdown(cancel_futures=True)

    def _decode(self, images: list[tuple[str, bytes]]) -> list[tuple[str, Tensor | str]]:
        return [(name, self._pixels(data)) for name, data in images]

    def _pixels(self, data: bytes) -> Tensor | str:
        try:
            return self.preprocess(data)
        except BROKEN as error:
            return str(error)


def read_encoded(listed: Iterable[dict[str, Any]], reader: Executor) -> Iterator[tuple[str, bytes]]:
    """sha256 and encoded bytes of every image of the list, in its order; the next row group is read meanwhile, on `reader`."""
    groups = (list(images) for _, images in itertools.groupby(listed, key=lambda one: (one["part"], one["group"])))
    for images in map_ahead(reader, _read_group, groups, 2):
        yield from images


def _read_group(wanted: list[dict[str, Any]]) -> list[tuple[str, bytes]]:
    """The bytes of images that stand in one row group."""
    with parquet.open_parquet(wanted[0]["part"]) as file:
        column = file.read_row_group(wanted[0]["group"], columns=["media.list.element.bytes"])["media"].combine_chunks()
    data = column.values.field("bytes")
    places = [column.offsets[one["row"]].as_py() + one["medium"] for one in wanted]
    media = ({"bytes": data[place].as_py(), "sha256": one["sha256"]} for one, place in zip(wanted, places, strict=True))
    return [(medium["sha256"], parquet.medium_bytes(medium, wanted[0]["part"])) for medium in media]


def map_ahead(pool: Executor, work: Callable[[In], Out], items: Iterable[In], most: int) -> Iterator[Out]:
    """`work` of every item, in order, done on `pool`: at most `most` are begun and not yet taken."""
    begun: deque[Future[Out]] = deque()
    for item in items:
        begun.append(pool.submit(work, item))
        if len(begun) == most:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
