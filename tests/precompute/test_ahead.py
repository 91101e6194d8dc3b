"""Pipelines on threads give what one loop gives, stop at any error, keep their limits, and leave no thread behind."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from voco.precompute.ahead import Abandoned, consume_behind, flat_map_ahead


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def parts(item: int) -> Iterator[tuple[int, int]]:
    """`item % 7` outputs, after pauses that let other threads pass."""
    for part in range(item % 7):
        time.sleep(random.random() * 0.002)
        yield item, part


EXPECTED = [(item, part) for item in range(40) for part in range(item % 7)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_outputs_come_in_the_order_of_one_loop(threads: int, limit: int) -> None:
    assert list(flat_map_ahead(parts, range(40), threads, limit)) == EXPECTED
    assert list(flat_map_ahead(parts, [], threads, limit)) == []


def test_work_runs_on_several_threads_and_ahead_of_the_consumer() -> None:
    names: set[str] = set()
    barrier = threading.Barrier(3, timeout=10)  # three items at the same time, or it breaks

    def work(item: int) -> list[int]:
        names.add(threading.current_thread().name + str(threading.get_ident()))
        barrier.wait()
        return [item]

    assert list(flat_map_ahead(work, range(6), 3, 10)) == list(range(6))
    assert len(names) == 3


@pytest.mark.parametrize("threads", [1, 4])
def test_at_most_the_limit_waits(threads: int) -> None:
    counts = {"made": 0, "used": 0}
    most = 0

    def work(item: int) -> Iterator[int]:
        for part in range(20):
            counts["made"] += 1
            yield part

    for _ in flat_map_ahead(work, range(10), threads, 6):
        counts["used"] += 1
        time.sleep(0.0005)
        most = max(most, counts["made"] - counts["used"])
    assert counts["used"] == 200
    assert 6 <= most <= 6 + 1 + threads  # those that wait, and what each thread has in its hands


def test_an_error_of_work_is_raised_after_the_outputs_before_it() -> None:
    def work(item: int) -> Iterator[int]:
        yield 10 * item
        if item == 3:
            raise KeyError("broken")
        yield 10 * item + 1

    outputs: list[int] = []
    with (
        pytest.raises(KeyError, match="broken"),
        closing(flat_map_ahead(work, itertools.count(), 3, 5)) as results,
    ):
        outputs.extend(results)
    assert outputs == [0, 1, 10, 11, 20, 21, 30]


def test_an_error_of_the_source_is_raised_after_the_outputs_before_it() -> None:
    def source() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the disk is gone")

    outputs: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        outputs.extend(flat_map_ahead(lambda item: [item, item], source(), 2, 5))
    assert outputs == [1, 1, 2, 2]


def test_a_consumer_that_leaves_early_ends_every_thread() -> None:
    started = itertools.count()
    last = 0

    def work(item: int) -> Iterator[int]:
        nonlocal last
        while True:
            last = next(started)
            yield item

    with closing(flat_map_ahead(work, itertools.count(), 3, 4)) as outputs:
        assert next(outputs) == 0
    stopped_at = last
    time.sleep(0.05)
    assert last == stopped_at


def test_consume_behind_is_the_consumer_on_another_thread() -> None:
    threads: list[int] = []

    def total(items: Iterator[int]) -> int:
        threads.append(threading.get_ident())
        return sum(items)

    for limit in (1, 2, 50):
        assert consume_behind(total, range(100), limit) == 4950
    assert threading.get_ident() not in threads
    assert consume_behind(list, [], 2) == []


def test_the_writers_error_ends_the_items() -> None:
    given = itertools.count()

    def broken(items: Iterator[int]) -> None:
        for item in items:
            if item == 5:
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        consume_behind(broken, given, 2)
    assert next(given) <= 10, "items without end were taken until the error only"


def test_an_error_of_the_items_reaches_the_consumer_as_abandoned_and_the_caller_as_it_is() -> None:
    seen: list[type[BaseException]] = []

    def writer(items: Iterator[int]) -> None:
        try:
            list(items)
        except BaseException as error:
            seen.append(type(error))
            raise

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("cannot be compressed")

    with pytest.raises(ValueError, match="cannot be compressed"):
        consume_behind(writer, items(), 2)
    assert seen == [Abandoned]


def test_items_wait_for_a_slow_consumer() -> None:
    counts = {"made": 0, "used": 0}
    most = 0

    def items() -> Iterator[int]:
        for item in range(30):
            counts["made"] += 1
            yield item

    def slow(given: Iterator[int]) -> None:
        nonlocal most
        for _ in given:
            time.sleep(0.001)
            counts["used"] += 1
            most = max(most, counts["made"] - counts["used"])

    consume_behind(slow, items(), 3)
    assert counts == {"made": 30, "used": 30}
    assert most <= 5
