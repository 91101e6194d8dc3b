"""Stages of a pipeline on threads, with bounded buffers: the same results in the same order as one loop.

Decoders, resizing, hashing and file writes release Python's lock, so threads are enough. An error of any stage ends all of
them, and no thread is left when a call returns or raises.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")
Result = TypeVar("Result")


class Abandoned(Exception):
    """Raised in a stage whose neighbour failed or stopped."""


class _Item(Generic[Out]):
    """The outputs of one item that wait for the consumer."""

    def __init__(self) -> None:
        self.outputs: deque[Out] = deque()
        self.done = False
        self.error: BaseException | None = None


class _Ahead(Generic[In, Out]):
    """State of `flat_map_ahead`. `changed` guards all of it but `source`, which `source_lock` guards."""

    def __init__(self, work: Callable[[In], Iterable[Out]], source: Iterator[In], limit: int) -> None:
        self.work, self.source, self.limit = work, source, limit
        self.source_lock, self.changed = threading.Lock(), threading.Condition()
        self.items: deque[_Item[Out]] = deque()  # in the source's order, the consumer's first
        self.waiting = 0  # outputs of all items
        self.ended = self.stopped = False

    def run(self) -> None:
        """A thread: take items and work on them until the source ends."""
        while (taken := self._take()) is not None:
            value, item = taken
            error: BaseException | None = None
            try:
                for output in self.work(value):
                    self._put(item, output)
            except BaseException as raised:  # noqa: BLE001 - raised again by the consumer, in its place
                error = raised
            del value, taken  # an encoded video is not kept while the next one is read
            with self.changed:
                item.done, item.error = True, error
                self.changed.notify_all()

    def _take(self) -> tuple[In, _Item[Out]] | None:
        """The next item, once there is room for its outputs; None after the last, after an error, and after a stop."""
        with self.source_lock:
            with self.changed:
                self.changed.wait_for(lambda: self.stopped or self.waiting < self.limit or not self.items)
                if self.stopped or self.ended:
                    return None
            item: _Item[Out] = _Item()
            try:
                value = next(self.source)
            except StopIteration:
                value = None
            except BaseException as raised:  # noqa: BLE001 - as in `run`
                item.done, item.error, value = True, raised, None
            with self.changed:
                self.ended = value is None
                if value is not None or item.error is not None:
                    self.items.append(item)
                self.changed.notify_all()
        return None if value is None else (value, item)

    def _put(self, item: _Item[Out], output: Out) -> None:
        with self.changed:
            # the consumer waits for its first item: that may go over the limit, or later items could fill the room for ever
            self.changed.wait_for(
                lambda: self.stopped or self.waiting < self.limit or (self.items[0] is item and not item.outputs)
            )
            if self.stopped:
                raise Abandoned
            item.outputs.append(output)
            self.waiting += 1
            self.changed.notify_all()

    def outputs(self) -> Iterator[Out]:
        """The consumer's side: every output in order."""
        while True:
            with self.changed:
                self.changed.wait_for(
                    lambda: bool(self.items and (self.items[0].outputs or self.items[0].done)) or self._at_end()
                )
                if not self.items:
                    return
                item = self.items[0]
                if not item.outputs:
                    if item.error is not None:
                        raise item.error
                    self.items.popleft()
                    self.changed.notify_all()
                    continue
                output = item.outputs.popleft()
                self.waiting -= 1
                self.changed.notify_all()
            yield output

    def _at_end(self) -> bool:
        return self.ended and not self.items

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


def flat_map_ahead(
    work: Callable[[In], Iterable[Out]], source: Iterable[In], threads: int, limit: int
) -> Generator[Out, None, None]:
    """The outputs of `work` for every item of `source`, in order, made ahead of the consumer on `threads` threads.

    An item is worked on by one thread. At most `limit` outputs wait, and one further of the item that the consumer is at.
    An error of `work` or of `source` is raised after the outputs before it. Items are never None. A consumer that leaves early
    must close the iterator, which waits for the outputs that are being made.
    """
    state = _Ahead(work, iter(source), limit)
    workers = [threading.Thread(target=state.run, name="voco-ahead", daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield from state.outputs()
    finally:
        state.stop()
        for worker in workers:
            worker.join()


class _Channel(Generic[Out]):
    """A bounded queue from one thread to another, of which either may end."""

    def __init__(self, limit: int) -> None:
        self.limit, self.changed = limit, threading.Condition()
        self.items: deque[Out] = deque()
        self.ended = self.abandoned = False

    def put(self, item: Out) -> bool:
        """False when the reader has ended."""
        with self.changed:
            self.changed.wait_for(lambda: self.abandoned or len(self.items) < self.limit)
            if not self.abandoned:
                self.items.append(item)
            self.changed.notify_all()
            return not self.abandoned

    def close(self, complete: bool) -> None:
        """No further item; without `complete` the reader gets Abandoned."""
        with self.changed:
            self.ended, self.abandoned = True, self.abandoned or not complete
            self.changed.notify_all()

    def abandon(self) -> None:
        with self.changed:
            self.abandoned = True
            self.changed.notify_all()

    def __iter__(self) -> Iterator[Out]:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: bool(self.items) or self.ended or self.abandoned)
                if self.abandoned:
                    raise Abandoned
                if not self.items:
                    return
                item = self.items.popleft()
                self.changed.notify_all()
            yield item


def consume_behind(consume: Callable[[Iterator[In]], Result], items: Iterable[In], limit: int) -> Result:
    """`consume(items)` with `items` made by this thread and consumed by another; at most `limit` items wait between them.

    Raises the consumer's error, which ends `items`, or that of `items`, for which the consumer's next item raises Abandoned.
    """
    channel: _Channel[In] = _Channel(limit)
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(consume(iter(channel)))
        except BaseException as raised:  # noqa: BLE001 - raised again by the caller's thread
            errors.append(raised)
        finally:
            channel.abandon()

    consumer = threading.Thread(target=run, name="voco-behind", daemon=True)
    consumer.start()
    complete = False
    try:
        for item in items:
            if not channel.put(item):
                break
        complete = True
    finally:
        channel.close(complete)
        consumer.join()
    if errors:
        raise errors[0]
    return results[0]
