"""Which samples share a row: pure functions of their lengths, the same on every machine."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sample indices of at most `capacity` tokens each; a longer sample is a row of its own.

    Best fit, longest first: a sample goes where it leaves the least room. At most 11/9 of the fewest rows possible, and one
    (Johnson, 1973).
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and row, ascending
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        at = bisect_left(room, (lengths[index], 0))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    return rows


def split_evenly(lengths: Sequence[int], count: int) -> list[list[int]]:
    """All samples in `count` rows of nearly equal length, some empty when there are fewer samples.

    The least capacity at which `pack` needs no more rows, found by halving (MULTIFIT; Coffman, Garey and Johnson, 1978). A
    row is as long as its samples: unlike a fixed capacity, the last one leaves nothing unused.
    """
    low, high = max([-(-sum(lengths) // count), *lengths]), max(1, sum(lengths))
    while low < high:
        middle = (low + high) // 2
        if len(pack(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    rows = sorted(sorted(row) for row in pack(lengths, high))
    return rows + [[]] * (count - len(rows))
