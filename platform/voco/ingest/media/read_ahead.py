"""The media of a unit from S3: several are read at once, before their turn, and delivered in the order of the work list.

In memory are WINDOW_BYTES of media that are being read or wait, and the medium whose turn it is, of any size. The size of a
medium is known from the answer to its request, so a request takes at most the size that recent media had; a larger medium is
requested again once the window has room for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from threading import Condition

from voco.ingest.media.source import TooLarge

READS = 32  # at once: at 30 ms a request a thousand media a second, more than one process can take
WAITING = 4 * READS  # media that are being read or wait
WINDOW_BYTES = 64 << 20
SMALL_BYTES = WINDOW_BYTES // READS  # a medium of this size never needs a second request

Medium = tuple[str, bytes]  # the name of the file that was read, and its bytes
Find = Callable[[int], Medium]  # of at most so many bytes; raises BadRow, for a larger file TooLarge


def read_ahead(finds: Iterable[Find], limit: int) -> Generator[Callable[[], Medium]]:
    """For each medium, in order, a call that waits for it and returns it or raises what its `find(limit)` raises.

    A medium counts as taken when the next is asked for. Closing the generator, or an exception, ends every thread before it
    returns.
    """
    window = _Window(limit)
    waiting: deque[tuple[int, Future[Medium]]] = deque()
    remaining = enumerate(finds)
    with ThreadPoolExecutor(READS, thread_name_prefix="media") as pool:
        try:
            while True:
                while len(waiting) < WAITING and (numbered := next(remaining, None)) is not None:
                    waiting.append((numbered[0], pool.submit(window.read, *numbered)))
                if not waiting:
                    return
                turn, medium = waiting.popleft()
                window.admit(turn)
                yield medium.result
                wait([medium])
                window.reserve(turn, 0)
        finally:
            for _, medium in waiting:
                medium.cancel()
            window.close()


class _Window:
    """The bytes that are reserved for each medium: what its request may bring, and once it is read, its size."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.expected = SMALL_BYTES  # bytes of the next medium
        self.changed = Condition()
        self.reserved: dict[int, int] = {}
        self.turn = -1
        self.closed = False

    def read(self, index: int, find: Find) -> Medium:
        """The medium, once the window has room for it or it is its turn.

        Raises what `find` raises, CancelledError once closed.
        """
        size = 0
        try:
            expected = min(self.expected, self.limit)
            self._wait_for(index, expected)
            try:
                medium = find(expected)
            except TooLarge as large:
                if large.size > self.limit:
                    raise TooLarge(large.path, large.size, self.limit) from large
                self._expect(large.size)
                self.reserve(index, 0)
                self._wait_for(index, large.size)
                medium = find(self.limit)
            size = len(medium[1])
            self._expect(size)
            return medium
        finally:
            self.reserve(index, size)

    def _expect(self, size: int) -> None:
        """Follow larger media at once and smaller ones slowly: a second request costs more than unused room."""
        slow = self.expected - self.expected // 16
        self.expected = max(SMALL_BYTES, min(WINDOW_BYTES // 2, max(size + size // 4, slow)))

    def _wait_for(self, index: int, size: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: sum(self.reserved.values()) + size <= WINDOW_BYTES or index <= self.turn or self.closed)
            if self.closed:
                raise CancelledError
            self.reserved[index] = size

    def reserve(self, index: int, size: int) -> None:
        """Reserve fewer bytes for a medium than before, or none."""
        with self.changed:
            self.reserved[index] = size
            if not size:
                del self.reserved[index]
            self.changed.notify_all()

    def admit(self, index: int) -> None:
        """It is this medium's turn: it may be read whatever its size."""
        with self.changed:
            self.turn = index
            self.changed.notify_all()

    def close(self) -> None:
        """Media that wait are not read any more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
