"""A thread that prepares the data of the next steps while the current one is computed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
AHEAD = 2  # steps


class Prefetch(Generic[Item]):
    """Items of an iterator, in order, of which a thread prepares `ahead` beyond the last one that was taken.

    An error of the iterator is raised where the item that it belongs to is taken, with the thread's traceback. Used as a context
    manager; its end waits until the item in work is complete and prepares no other.
    """

    def __init__(self, items: Iterator[Item], ahead: int = AHEAD) -> None:
        self._items, self._ahead = items, ahead
        self._ready: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closed, self._ended = False, False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._prepare, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def take(self) -> tuple[Item, float]:
        """The next item, and the seconds that it was waited for. Raises StopIteration after the last."""
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            waited = time.monotonic() - started
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item, waited
        raise self._error or StopIteration

    def _prepare(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._ahead)
                    if self._closed:
                        return
                del item  # it may be large, and the next one is in work
        except BaseException as error:  # noqa: BLE001 - raised again by `take`
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
