"""The media of a unit from the web: several downloads at a time, handed out in the order of the work list."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition

from voco.ingest.media.download import DownloadLimits, download
from voco.ingest.media.image import MediaSource

HELD_BYTES = 64 << 20  # of finished downloads that wait for a slow one before them
AHEAD = 16  # so many times the threads may be ahead of the slowest


@dataclass(frozen=True)
class WebMedia:
    """Media by their URLs. Holds about `HELD_BYTES` of finished files, and those that the threads are at."""

    web: DownloadLimits
    threads: int
    limit: int  # bytes of one file

    def sources(self, places: list[str]) -> Iterator[MediaSource]:
        """A source for each URL, in order; asked for its bytes, it waits for its own download only."""
        waiting: deque[Future[bytes]] = deque()
        rest = iter(enumerate(places))
        room = _Room()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="download") as pool:
            try:
                for index in range(len(places)):
                    while len(waiting) < AHEAD * self.threads and (one := next(rest, None)) is not None:
                        waiting.append(pool.submit(self._fetch, *one, room))
                    room.let(index)
                    wanted = waiting.popleft()
                    yield _Downloaded(wanted)
                    room.add(-len(wanted.result()) if wanted.exception() is None else 0)
            finally:
                for left in waiting:
                    left.cancel()
                room.let(len(places))

    def _fetch(self, index: int, url: str, room: _Room) -> bytes:
        room.enter(index)
        data = download(url, self.limit, self.web)
        room.add(len(data))
        return data


class _Room:
    """Lets a download begin while less than `HELD_BYTES` wait to be taken; the one that is waited for, always."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.held = 0
        self.wanted = -1

    def enter(self, index: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.held < HELD_BYTES or index <= self.wanted)

    def add(self, size: int) -> None:
        with self.changed:
            self.held += size
            self.changed.notify_all()

    def let(self, index: int) -> None:
        with self.changed:
            self.wanted = index
            self.changed.notify_all()


@dataclass(frozen=True)
class _Downloaded:
    future: Future[bytes]

    def read(self, path: str, limit: int) -> bytes:
        """The file's bytes. Raises what `download` raises."""
        return self.future.result()
