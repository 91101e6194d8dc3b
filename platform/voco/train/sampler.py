"""Which samples each step of each worker trains on: one pure function of seed and epoch (docs/data.md).

A sample is named by (row group, row in it). Row groups are dealt to virtual ranks, whose number depends on the global batch
alone. Each shuffles its rows, a global batch takes an equal share from each, and a worker serves consecutive virtual ranks: so a
row group is read by one worker, and the global batches are the same for any number of workers, also where it does not divide
that of the virtual ranks: then some workers serve one more than others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from voco.job.config import Training, virtual_ranks

LIVE_GROUPS = 128  # row groups from which the samples of one global batch come, about, over all workers
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
        totals = [0] * len(self.weights)
        for size, owner in zip(self.sizes, self.owners, strict=True):
            totals[owner] += size
        return totals


@dataclass(frozen=True)
class EpochOrder:
    """`rows` (steps, global_batch, 2) int64: (row group, row in it), virtual rank by virtual rank; (-1, -1) fills the tail."""

    rows: Rows

    @property
    def steps(self) -> int:
        return len(self.rows)

    def rank_rows(self, step: int, rank: int, world: int) -> Rows:
        """(n, 2): the samples of one rank at one step, those of the virtual ranks that it serves (`served`)."""
        global_batch = self.rows.shape[1]
        served_here = served(global_batch, rank, world)
        share = global_batch // virtual_ranks(global_batch)
        rows: Rows = self.rows[step, served_here.start * share : served_here.stop * share]
        return rows


def served(global_batch: int, rank: int, world: int) -> range:
    """The virtual ranks that a worker serves: of V on W workers floor(V / W) or ceil(V / W), consecutive and disjoint."""
    pieces = virtual_ranks(global_batch)
    return range(rank * pieces // world, (rank + 1) * pieces // world)


def micro_batches_of(block: Training, world: int) -> int:
    """Micro-batches that each of `world` workers runs in one step: as many as the worker with the most samples needs.

    A worker with fewer samples fills the rest with batches of weight zero, because all take part in each backward pass. Not for
    a block with `micro_tokens`, where each step has as many as its tokens need.
    """
    assert block.micro_batch is not None
    pieces = virtual_ranks(block.global_batch)
    samples = -(-pieces // world) * (block.global_batch // pieces)
    return -(-samples // block.micro_batch)


def epoch_order(mix: TableMix, seed: int, epoch: int, global_batch: int) -> EpochOrder:
    """Order of one epoch. A table of weight w gives each sample floor(w) times, and a random share of them once more.

    The rows of the permuted row groups are one sequence, rows of a group in random order, that is cut into equal consecutive
    pieces, one for each virtual rank: of G row groups at most one less than the virtual ranks lie in two pieces.
    """
    generator = np.random.default_rng([seed, epoch])
    groups, rows = _epoch_rows(mix, generator)
    at = np.empty(len(mix.sizes), dtype=np.int64)
    at[generator.permutation(len(mix.sizes))] = np.arange(len(mix.sizes))
    sequence = np.lexsort((generator.random(len(groups)), at[groups]))
    pieces = virtual_ranks(global_batch)
    lengths = _piece_lengths(len(groups), global_batch, pieces)
    piece = np.repeat(np.arange(pieces), lengths)
    # a row moves up to `window` row groups on: they overlap, so that a worker always reads a little and never a window at once
    moved = at[groups[sequence]] + window(pieces) * generator.random(len(groups))
    order = sequence[np.lexsort((moved, piece))]
    steps, share = -(-len(groups) // global_batch), global_batch // pieces
    filled = np.full((pieces, steps * share, 2), -1, dtype=np.int64)
    offset = np.arange(len(groups)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    filled[piece, offset, 0] = groups[order]
    filled[piece, offset, 1] = rows[order]
    return EpochOrder(filled.reshape(pieces, steps, share, 2).swapaxes(0, 1).reshape(steps, global_batch, 2))


def window(pieces: int) -> int:
    """How many row groups a row may move on in its virtual rank: rows of as many are mixed at any time."""
    return max(2, LIVE_GROUPS // pieces)


def live_groups(global_batch: int, world: int) -> int:
    """Row groups that a worker keeps so that it reads none twice.

    Between two uses of a row group, a virtual rank takes rows of the `window` groups before it and of those after it.
    """
    pieces = virtual_ranks(global_batch)
    return -(-pieces // world) * 2 * window(pieces)


def _piece_lengths(samples: int, global_batch: int, pieces: int) -> Rows:
    """(pieces,) samples of each: those of all its steps, less its part of the places that the last step leaves empty."""
    fill = -samples % global_batch
    return (samples + fill) // pieces - (fill + np.arange(pieces)) // pieces


def _weighted(total: int, weight: float) -> int:
    return int(weight) * total + round((weight - int(weight)) * total)


def _epoch_rows(mix: TableMix, generator: np.random.Generator) -> tuple[Rows, Rows]:
    """Row group and row of every sample of an epoch, table by table; the random share is one of the entire table."""
    sizes, owners = np.asarray(mix.sizes, dtype=np.int64), np.asarray(mix.owners)
    groups, rows = [], []
    for table, weight in enumerate(mix.weights):
        own = np.flatnonzero(owners == table)
        total = int(sizes[own].sum())
        repeats = np.full(total, int(weight), dtype=np.int64)
        repeats[generator.permutation(total)[: _weighted(total, weight) - int(weight) * total]] += 1
        starts = np.cumsum(sizes[own]) - sizes[own]
        groups.append(np.repeat(np.repeat(own, sizes[own]), repeats))
        rows.append(np.repeat(np.arange(total) - np.repeat(starts, sizes[own]), repeats))
    return np.concatenate(groups), np.concatenate(rows)
