"""Which rows each step of each rank trains on: one pure function of seed and epoch (design section 4).

A row is named by (table, row group, row): permute row groups, shuffle rows in windows of several groups, cut into global
batches, slice by rank. An epoch's tail is filled with rows of no weight, so every rank takes the same number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 8  # row groups whose rows are mixed, and which are in memory at a time
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Epoch:
    """`rows` (steps, global_batch, 2) int64: (row group, row); (-1, -1) fills the tail."""

    rows: Rows

    @property
    def steps(self) -> int:
        return len(self.rows)

    def of_rank(self, step: int, rank: int, world: int) -> Rows:
        """(global_batch / world, 2): the rows of one rank at one step."""
        share = self.rows.shape[1] // world
        mine: Rows = self.rows[step, rank * share : (rank + 1) * share]
        return mine


def epoch_order(
    group_rows: Sequence[int], group_weight: Sequence[float], seed: int, epoch: int, global_batch: int, window: int = WINDOW
) -> Epoch:
    """Order of one epoch over all row groups. `group_weight` w shows a group's rows w times: floor(w) times each, and a
    drawn part of them once more."""
    draw = np.random.default_rng([seed, epoch])
    groups = draw.permutation(len(group_rows))
    parts = []
    for start in range(0, len(groups), window):
        held = [_repeat(int(group), group_rows[group], group_weight[group], draw) for group in groups[start : start + window]]
        parts.append(draw.permutation(np.concatenate(held)))
    rows = np.concatenate(parts)
    fill = -len(rows) % global_batch
    rows = np.concatenate([rows, np.full((fill, 2), -1, dtype=np.int64)])
    return Epoch(rows.reshape(-1, global_batch, 2))


def _repeat(group: int, count: int, weight: float, draw: np.random.Generator) -> Rows:
    whole = np.tile(np.arange(count), int(weight))
    extra = draw.permutation(count)[: round((weight - int(weight)) * count)]
    rows = np.concatenate([whole, extra])
    return np.stack([np.full(len(rows), group), rows], axis=1).astype(np.int64)


def steps_per_epoch(group_rows: Sequence[int], group_weight: Sequence[float], global_batch: int) -> int:
    total = sum(
        int(weight) * count + round((weight - int(weight)) * count)
        for count, weight in zip(group_rows, group_weight, strict=True)
    )
    return -(-total // global_batch)
