"""Neighbouring ranges of a file in S3, such as the members of a tar shard, read by one request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

RUN_BYTES = 1 << 20  # most bytes that one request reads of several ranges: a few such requests fill the link
GAP_BYTES = 64 << 10  # most bytes between two ranges that are read with them; at 90 MB/s, under a millisecond

Range = tuple[int, int]  # first byte and size


def joined(ranges: Iterable[tuple[str, int, int]], most_bytes: int = RUN_BYTES) -> Iterator[tuple[str, list[Range]]]:
    """Runs of consecutive (file, first byte, size) whose starts ascend in one file and leave gaps of at most GAP_BYTES.

    A run has at most `most_bytes`, with its gaps; a range that joins no other is a run by itself, of any size. The order stays.
    """
    current, run, end = "", list[Range](), 0
    for file, start, size in ranges:
        near = bool(run) and file == current and run[-1][0] <= start <= end + GAP_BYTES
        if near and max(end, start + size) - run[0][0] <= most_bytes:
            run.append((start, size))
            end = max(end, start + size)
            continue
        if run:
            yield current, run
        current, run, end = file, [(start, size)], start + size
    if run:
        yield current, run


class Span:
    """The bytes from a run's first range to its last, read at the first need and kept as long as this object. Thread-safe."""

    def __init__(self, read_at: Callable[[int, int], bytes], run: list[Range]) -> None:
        self.read_at, self.run = read_at, run
        self.lock = threading.Lock()
        self.data: bytes | None = None

    def read(self, start: int, size: int) -> bytes:
        """The bytes of a range of the run; fewer at the end of the file. Raises what `read_at` raises."""
        if len(self.run) == 1:
            return self.read_at(start, size)
        first = self.run[0][0]
        with self.lock:
            if self.data is None:
                self.data = self.read_at(first, max(start + size for start, size in self.run) - first)
        return self.data[start - first : start - first + size]
