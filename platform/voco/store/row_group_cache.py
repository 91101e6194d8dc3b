"""An LRU cache of Parquet row groups with a limit in bytes, which reads many at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Generic, TypeVar

from voco.store.part_files import THREADS

Key = TypeVar("Key", bound=Hashable)
LIMIT_BYTES = 1 << 30


class RowGroupCache(Generic[Key]):
    """Row groups by key, as `read` returns them: anything with `nbytes`. Above `limit` bytes the least recently used one is
    dropped; the one just read stays, however large it is. Thread-safe: a row group is not read by two threads at once.
    """

    def __init__(self, read: Callable[[Key], Any], limit: int = LIMIT_BYTES) -> None:
        self.read, self.limit, self.bytes = read, limit, 0
        self.groups: OrderedDict[Key, Any] = OrderedDict()
        self._reading: dict[Key, Future[Any]] = {}
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None

    def get(self, key: Key) -> Any:
        """A row group, read from its file unless it is in memory."""
        with self._lock:
            if key in self.groups:
                self.groups.move_to_end(key)
                return self.groups[key]
            reading = self._reading.get(key)
            is_new = reading is None
            if reading is None:
                reading = self._reading[key] = Future()
        if is_new:
            try:
                group = self.read(key)
            except BaseException as error:
                with self._lock:
                    del self._reading[key]
                reading.set_exception(error)
                raise
            with self._lock:
                del self._reading[key]
                self._add(key, group)
            reading.set_result(group)
        return reading.result()

    def load(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """These row groups, all of them even above `limit`; those not in memory are read, THREADS at a time."""
        with self._lock:
            wanted = list(dict.fromkeys(keys))
            groups = {key: self.groups[key] for key in wanted if key in self.groups}
            for key in groups:
                self.groups.move_to_end(key)
            missing = [key for key in wanted if key not in groups]
            if len(missing) > 1 and self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS)
        read = map(self.get, missing) if len(missing) < 2 or self._pool is None else self._pool.map(self.get, missing)
        return groups | dict(zip(missing, read, strict=True))

    def _add(self, key: Key, group: Any) -> None:
        self.groups[key] = group
        self.bytes += group.nbytes
        while self.bytes > self.limit and len(self.groups) > 1:
            self.bytes -= self.groups.popitem(last=False)[1].nbytes
