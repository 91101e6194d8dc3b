"""Which samples each step of each rank trains on: one pure function of seed and epoch (design section 4).

A sample is named by (row group, place in it): permute row groups, shuffle in windows of several groups, cut into global
batches, slice by rank. An epoch's tail is filled with samples of no weight, so every rank takes the same number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 8  # row groups whose samples are mixed, and which are in memory at a time
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TableMix:
    """What there is to train on. G row groups of one or more tables."""

    sizes: tuple[int, ...]  # (G,) samples of each row group
    table: tuple[int, ...]  # (G,) the table that each belongs to
    weight: tuple[float, ...]  # of each table: its samples seen in one epoch, as a multiple of their number

    def shown(self) -> int:
        """Samples of one epoch."""
        return sum(_shown(total, weight) for total, weight in zip(self._totals(), self.weight, strict=True))

    def steps(self, global_batch: int) -> int:
        """Steps of one epoch, the filled last one included."""
        return -(-self.shown() // global_batch)

    def _totals(self) -> list[int]:
        return [
            sum(size for size, owner in zip(self.sizes, self.table, strict=True) if owner == table)
            for table in range(len(self.weight))
        ]


@dataclass(frozen=True)
class EpochOrder:
    """`rows` (steps, global_batch, 2) int64: (row group, place in it); (-1, -1) fills the tail."""

    rows: Rows

    @property
    def steps(self) -> int:
        return len(self.rows)

    def of_rank(self, step: int, rank: int, world: int) -> Rows:
        """(global_batch / world, 2): the samples of one rank at one step."""
        share = self.rows.shape[1] // world
        mine: Rows = self.rows[step, rank * share : (rank + 1) * share]
        return mine


def epoch_order(mix: TableMix, seed: int, epoch: int, global_batch: int, window: int = WINDOW) -> EpochOrder:
    """Order of one epoch. A table of weight w shows each sample floor(w) times, and a drawn share of them once more."""
    draw = np.random.default_rng([seed, epoch])
    times = _times(mix, draw)
    groups = draw.permutation(len(mix.sizes))
    parts = []
    for start in range(0, len(groups), window):
        held = []
        for group in groups[start : start + window]:
            places = np.repeat(np.arange(mix.sizes[group]), times[group])
            held.append(np.stack([np.full(len(places), group), places], axis=1))
        parts.append(draw.permutation(np.concatenate(held)))
    rows = np.concatenate(parts).astype(np.int64)
    fill = -len(rows) % global_batch
    rows = np.concatenate([rows, np.full((fill, 2), -1, dtype=np.int64)])
    return EpochOrder(rows.reshape(-1, global_batch, 2))


def _shown(total: int, weight: float) -> int:
    return int(weight) * total + round((weight - int(weight)) * total)


def _times(mix: TableMix, draw: np.random.Generator) -> list[Rows]:
    """How often each sample of each row group is shown; the drawn share is one of the whole table, however it is cut."""
    times: list[Rows] = [np.zeros(0, dtype=np.int64)] * len(mix.sizes)
    for table, weight in enumerate(mix.weight):
        groups = [group for group, owner in enumerate(mix.table) if owner == table]
        total = sum(mix.sizes[group] for group in groups)
        whole = np.full(total, int(weight), dtype=np.int64)
        whole[draw.permutation(total)[: _shown(total, weight) - int(weight) * total]] += 1
        cuts = np.cumsum([mix.sizes[group] for group in groups])[:-1]
        for group, part in zip(groups, np.split(whole, cuts), strict=True):
            times[group] = part
    return times
