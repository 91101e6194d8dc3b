"""Which samples each step of each rank trains on: one pure function of seed and epoch (docs/data.md).

A sample is named by (row group, row in it). Row groups are permuted, rows are shuffled in windows of several groups, cut into
global batches and sliced by rank. An epoch's tail is filled with zero-weight samples, so every rank takes equally many steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 8  # row groups that are shuffled together, and are in memory at a time
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TableMix:
    """The tables of a training mix: G row groups of one or more tables."""

    sizes: tuple[int, ...]  # (G,) samples of each row group
    owners: tuple[int, ...]  # (G,) the table of each row group
    weights: tuple[float, ...]  # of each table: samples of one epoch, as a multiple of the table's samples

    def epoch_samples(self) -> int:
        return sum(_weighted(total, weight) for total, weight in zip(self._totals(), self.weights, strict=True))

    def steps(self, global_batch: int) -> int:
        """Steps of one epoch, including a partly filled last one."""
        return -(-self.epoch_samples() // global_batch)

    def _totals(self) -> list[int]:
        return [
            sum(size for size, owner in zip(self.sizes, self.owners, strict=True) if owner == table)
            for table in range(len(self.weights))
        ]


@dataclass(frozen=True)
class EpochOrder:
    """`rows` (steps, global_batch, 2) int64: (row group, row in it); (-1, -1) fills the tail."""

    rows: Rows

    @property
    def steps(self) -> int:
        return len(self.rows)

    def rank_rows(self, step: int, rank: int, world: int) -> Rows:
        """(global_batch / world, 2): the samples of one rank at one step."""
        share = self.rows.shape[1] // world
        rows: Rows = self.rows[step, rank * share : (rank + 1) * share]
        return rows


def epoch_order(mix: TableMix, seed: int, epoch: int, global_batch: int, window: int = WINDOW) -> EpochOrder:
    """Order of one epoch. A table of weight w gives each sample floor(w) times, and a random share of them once more."""
    generator = np.random.default_rng([seed, epoch])
    repeats = _repeats(mix, generator)
    groups = generator.permutation(len(mix.sizes))
    windows = []
    for start in range(0, len(groups), window):
        parts = []
        for group in groups[start : start + window]:
            rows = np.repeat(np.arange(mix.sizes[group]), repeats[group])
            parts.append(np.stack([np.full(len(rows), group), rows], axis=1))
        windows.append(generator.permutation(np.concatenate(parts)))
    order = np.concatenate(windows).astype(np.int64)
    fill = -len(order) % global_batch
    order = np.concatenate([order, np.full((fill, 2), -1, dtype=np.int64)])
    return EpochOrder(order.reshape(-1, global_batch, 2))


def _weighted(total: int, weight: float) -> int:
    return int(weight) * total + round((weight - int(weight)) * total)


def _repeats(mix: TableMix, generator: np.random.Generator) -> list[Rows]:
    """How often each sample of each row group is used. The random share is one of the entire table, however it is cut."""
    repeats: list[Rows] = [np.zeros(0, dtype=np.int64)] * len(mix.sizes)
    for table, weight in enumerate(mix.weights):
        groups = [group for group, owner in enumerate(mix.owners) if owner == table]
        total = sum(mix.sizes[group] for group in groups)
        counts = np.full(total, int(weight), dtype=np.int64)
        counts[generator.permutation(total)[: _weighted(total, weight) - int(weight) * total]] += 1
        cuts = np.cumsum([mix.sizes[group] for group in groups])[:-1]
        for group, part in zip(groups, np.split(counts, cuts), strict=True):
            repeats[group] = part
    return repeats
