"""Images of a step as pixels, for training without `features/`: encoded bytes of its rows, decoded on threads.

The frozen tower then runs in the step itself (`model/voco_llama.py`), so nothing is stored, and nothing is read but the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from voco.errors import message_line
from voco.precompute.pixel_loader import UNDECODABLE


class UndecodableImage(Exception):
    """An image of the training data that is no picture. The message names the sample and says what to do."""


class LiveImages:
    """Pixels of images by hash, where `FeatureStore` gives their features: `images(sha256)` is (T, P, P, 3) uint8.

    `preprocess` makes them of encoded bytes, on `threads` threads. Only the images of the last `load` are kept.
    """

    def __init__(self, preprocess: Callable[[bytes], Tensor], threads: int) -> None:
        self.preprocess = preprocess
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="voco-pixels")
        self._pixels: dict[str, Future[Tensor]] = {}
        self._samples: dict[str, str] = {}  # sample that has the image

    def load(self, rows: Iterable[dict[str, Any]]) -> None:
        """Start to decode the images of these rows, whose media have their bytes; each image once."""
        earlier, self._pixels, self._samples = self._pixels, {}, {}
        for row in rows:
            for medium in row["media"] or []:
                name = medium["sha256"]
                if name not in self._pixels:
                    decoded = earlier.pop(name) if name in earlier else self._pool.submit(self.preprocess, medium["bytes"])
                    self._pixels[name] = decoded
                    self._samples[name] = row["sample_id"]
        for unused in earlier.values():
            unused.cancel()

    def __call__(self, sha256: str) -> Tensor:
        """(T, P, P, 3) uint8 of an image of the last `load`, once it is decoded. Raises UndecodableImage."""
        try:
            return self._pixels[sha256].result()
        except UNDECODABLE as error:
            where = f"sample {self._samples[sha256]}: image {sha256} cannot be decoded"
            raise UndecodableImage(f"{where}; ingest with `validate: full` rejects it: {message_line(error)}") from error

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
