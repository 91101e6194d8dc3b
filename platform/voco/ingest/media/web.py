"""The media of a unit from the web: concurrent downloads, returned in the order of the work list."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition
from typing import ClassVar

from voco.ingest.media.download import DownloadLimits, download
from voco.ingest.media.source import MediaSource

WAITING_BYTES = 64 << 20  # of finished downloads that wait for an earlier, slow one
AHEAD = 16  # downloads that are started before the earliest one ends, as a multiple of the threads


@dataclass(frozen=True)
class WebMedia:
    """Media by their URLs. Keeps about WAITING_BYTES of finished files in memory, and one file of each thread."""

    limits: DownloadLimits
    threads: int
    max_bytes: int  # of one file
    concurrent: ClassVar[bool] = False  # its sources already are downloads that were started ahead

    def sources(self, locations: list[str]) -> Iterator[MediaSource]:
        """A source for each URL, in order. Reading it waits for its own download only."""
        downloads: deque[Future[bytes]] = deque()
        urls = iter(enumerate(locations))
        budget = _Budget()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="download") as pool:
            try:
                for index in range(len(locations)):
                    while len(downloads) < AHEAD * self.threads and (numbered := next(urls, None)) is not None:
                        downloads.append(pool.submit(self._fetch, *numbered, budget))
                    budget.admit(index)
                    earliest = downloads.popleft()
                    yield _Downloaded(earliest)
                    budget.add(-len(earliest.result()) if earliest.exception() is None else 0)
            finally:
                for future in downloads:
                    future.cancel()
                budget.admit(len(locations))

    def _fetch(self, index: int, url: str, budget: _Budget) -> bytes:
        budget.wait(index)
        data = download(url, self.max_bytes, self.limits)
        budget.add(len(data))
        return data


class _Budget:
    """Lets a download start while fewer than WAITING_BYTES wait to be read; those up to the admitted index always start."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.waiting_bytes = 0
        self.admitted = -1

    def wait(self, index: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting_bytes < WAITING_BYTES or index <= self.admitted)

    def add(self, size: int) -> None:
        with self.changed:
            self.waiting_bytes += size
            self.changed.notify_all()

    def admit(self, index: int) -> None:
        with self.changed:
            self.admitted = index
            self.changed.notify_all()


@dataclass(frozen=True)
class _Downloaded:
    future: Future[bytes]

    def read(self, path: str, limit: int) -> bytes:
        """The file's bytes. Raises what `download` raises."""
        return self.future.result()
