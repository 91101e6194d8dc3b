"""The byte-bounded cache of row groups: what stays, what leaves, and what is read again."""

from __future__ import annotations

import numpy as np

from voco.store.row_group_cache import RowGroupCache


def test_the_group_used_longest_ago_leaves_and_the_last_one_stays() -> None:
    reads: list[tuple[str, int]] = []

    def read(file: str, number: int) -> np.ndarray:
        reads.append((file, number))
        return np.zeros(number, dtype=np.uint8)

    cache: RowGroupCache[str] = RowGroupCache(read, limit=100)
    for number in (40, 50, 40, 30, 40, 50):  # 50 leaves for 30, and is read again
        assert cache.get("a", number).nbytes == number
    assert reads == [("a", 40), ("a", 50), ("a", 30), ("a", 50)]
    assert (list(cache.groups), cache.bytes) == ([("a", 40), ("a", 50)], 90)
    assert cache.get("b", 500).nbytes == 500, "larger than the limit, alone"
    assert list(cache.groups) == [("b", 500)]
    assert cache.bytes == 500
