"""The byte-bounded cache of row groups: what stays, what leaves, what is read again, and reading from many threads."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from voco.store.row_group_cache import RowGroupCache


def test_the_group_used_longest_ago_leaves_and_the_last_one_stays() -> None:
    reads: list[tuple[str, int]] = []

    def read(key: tuple[str, int]) -> np.ndarray:
        reads.append(key)
        return np.zeros(key[1], dtype=np.uint8)

    cache: RowGroupCache[tuple[str, int]] = RowGroupCache(read, limit=100)
    for number in (40, 50, 40, 30, 40, 50):  # 50 leaves for 30, and is read again
        assert cache.get(("a", number)).nbytes == number
    assert reads == [("a", 40), ("a", 50), ("a", 30), ("a", 50)]
    assert (list(cache.groups), cache.bytes) == ([("a", 40), ("a", 50)], 90)
    assert cache.get(("b", 500)).nbytes == 500, "larger than the limit, alone"
    assert list(cache.groups) == [("b", 500)]
    assert cache.bytes == 500


def test_missing_groups_are_read_side_by_side_and_each_once() -> None:
    """Eight reads wait for each other, so they cannot be one after the other; later calls read nothing."""
    together = threading.Barrier(8, timeout=20)
    reads: Counter[int] = Counter()

    def read(key: int) -> np.ndarray:
        reads[key] += 1
        together.wait()
        return np.full(3, key)

    cache: RowGroupCache[int] = RowGroupCache(read)
    cache.load([*range(8), *range(8)])
    with ThreadPoolExecutor(4) as pool:
        assert [int(group[0]) for group in pool.map(cache.get, [*range(8)] * 3)] == [*range(8)] * 3
    cache.load(range(8))
    assert reads == Counter(range(8))


def test_loaded_groups_above_the_limit_are_read_once_too() -> None:
    reads: Counter[int] = Counter()

    def read(key: int) -> np.ndarray:
        reads[key] += 1
        return np.full(10, key, dtype=np.uint8)

    cache: RowGroupCache[int] = RowGroupCache(read, limit=30)
    cache.load([7])
    loaded = cache.load([*range(8), *range(8)])
    assert {key: int(group[0]) for key, group in loaded.items()} == {key: key for key in range(8)}
    assert reads == Counter(range(8))
    assert cache.bytes == 30


def test_a_read_that_fails_is_tried_again() -> None:
    failures = [OSError("no answer")]

    def read(key: int) -> np.ndarray:
        if failures:
            raise failures.pop()
        return np.zeros(key)

    cache: RowGroupCache[int] = RowGroupCache(read)
    with pytest.raises(OSError, match="no answer"):
        cache.load([5])
    assert cache.get(5).shape == (5,)
