"""The thread that prepares steps: the same items in order, never more than two ahead, errors where they belong, a clean end."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator

import pytest

from voco.train.prefetch import Prefetch


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_and_at_most_two_are_ahead() -> None:
    prepared: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            prepared.append(number)
            yield number

    with Prefetch(items()) as steps:
        for number in range(20):
            item, _ = steps.take()
            assert item == number
            time.sleep(0.005)
            assert prepared[-1] <= number + 2
        with pytest.raises(StopIteration):
            steps.take()
    assert not own_threads()


def test_items_are_prepared_while_the_caller_works_and_the_wait_is_measured() -> None:
    gate, prepared = threading.Event(), threading.Semaphore(0)

    def items() -> Iterator[int]:
        assert gate.wait(60)
        for number in range(3):
            yield number
            prepared.release()  # the item is with the caller's side

    with Prefetch(items()) as steps:
        threading.Timer(0.3, gate.set).start()
        _, first = steps.take()
        assert prepared.acquire(timeout=60)
        assert prepared.acquire(timeout=60)  # the second item is ready before it is taken
        _, second = steps.take()
    assert first > 0.2
    assert second < 0.2


def test_an_error_is_raised_by_the_step_that_needs_the_data_with_the_thread_s_traceback() -> None:
    def read_part(number: int) -> int:
        if number == 2:
            raise OSError("part-00002.parquet is gone")
        return number

    with Prefetch(map(read_part, range(5))) as steps:
        assert [steps.take()[0], steps.take()[0]] == [0, 1]
        with pytest.raises(OSError, match="part-00002") as raised:
            steps.take()
    assert "read_part" in {frame.name for frame in traceback.extract_tb(raised.value.__traceback__)}
    assert not own_threads()


def test_leaving_early_ends_the_thread_and_prepares_nothing_more() -> None:
    prepared: list[int] = []

    def items() -> Iterator[int]:
        number = 0
        while True:
            prepared.append(number)
            yield number
            number += 1

    class NonFinite(Exception):
        pass

    def train() -> None:
        with Prefetch(items()) as steps:
            steps.take()
            raise NonFinite

    with pytest.raises(NonFinite):
        train()
    assert not own_threads()
    count = len(prepared)
    time.sleep(0.02)
    assert len(prepared) == count <= 4
