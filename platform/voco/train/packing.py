"""Which samples share a row: pure functions of their lengths, the same on every machine."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sample indices of at most `capacity` tokens each; a longer sample gets a row alone.

    Best fit, longest first: a sample goes where it leaves the least free space. At most 11/9 of the fewest rows possible,
    plus one (Johnson, 1973).
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # free tokens and row, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(free, (lengths[index], 0))
        if at < len(free):
            space, row = free.pop(at)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(free, (space - lengths[index], row))
    return rows


def split_evenly(lengths: Sequence[int], count: int, capacity: int | None = None) -> list[list[int]]:
    """All samples in `count` rows of nearly equal length; some are empty when there are fewer samples.

    Finds the least capacity at which `pack` needs no more rows, by bisection (MULTIFIT; Coffman, Garey and Johnson, 1978).
    A row is only as long as its samples, so unlike a fixed capacity the last row wastes nothing. No row is longer than
    `capacity`, at which `pack` must need no more than `count` rows.
    """
    low = max([-(-sum(lengths) // count), *lengths])
    high = max(1, sum(lengths)) if capacity is None else capacity
    while low < high:
        middle = (low + high) // 2
        if len(pack(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    rows = sorted(sorted(row) for row in pack(lengths, high))
    return rows + [[]] * (count - len(rows))


def split_by_tokens(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """All samples in few rows of nearly equal length, of at most `tokens` each; a longer sample gets a row alone."""
    alone = [[index] for index, length in enumerate(lengths) if length > tokens]
    fitting = [index for index, length in enumerate(lengths) if length <= tokens]
    fitting_lengths = [lengths[index] for index in fitting]
    count = len(pack(fitting_lengths, tokens))
    rows = split_evenly(fitting_lengths, count, tokens) if count else []
    return sorted(alone + [[fitting[at] for at in row] for row in rows])
