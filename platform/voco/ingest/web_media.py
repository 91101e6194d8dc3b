"""The media of a unit from the web: several downloads at a time, handed out in the order of the work list."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from voco.ingest.download import Web, download
from voco.ingest.media import MediaSource

HELD_BYTES = 64 << 20  # of finished downloads that wait for a slow one before them
AHEAD = 16  # so many times the threads may be ahead of the slowest


@dataclass(frozen=True)
class WebMedia:
    """Media by their URLs. Holds `HELD_BYTES` of finished files at most, and those that the threads are at."""

    web: Web
    threads: int
    limit: int  # bytes of one file

    def sources(self, places: list[str]) -> Iterator[MediaSource]:
        """A source for each URL, in order; asked for its bytes, it waits for its own download only."""
        waiting: deque[Future[bytes]] = deque()
        rest = iter(places)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="download") as pool:
            try:
                while True:
                    while self._has_room(waiting) and (url := next(rest, None)) is not None:
                        waiting.append(pool.submit(download, url, self.limit, self.web))
                    if not waiting:
                        return
                    yield _Downloaded(waiting.popleft())
            finally:
                for one in waiting:
                    one.cancel()

    def _has_room(self, waiting: deque[Future[bytes]]) -> bool:
        if len(waiting) < self.threads:
            return True
        held = sum(len(one.result()) for one in waiting if one.done() and one.exception() is None)
        return len(waiting) < AHEAD * self.threads and held < HELD_BYTES


@dataclass(frozen=True)
class _Downloaded:
    future: Future[bytes]

    def read(self, path: str, limit: int) -> bytes:
        """The file's bytes. Raises what `download` raises."""
        return self.future.result()
