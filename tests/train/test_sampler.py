"""The order of an epoch: each sample as often as its weight says, each row group read by one worker, mixed like a permutation."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voco.job.config import Training, virtual_ranks
from voco.train.sampler import (
    EpochOrder,
    Rows,
    TableMix,
    epoch_order,
    live_groups,
    micro_batches_of,
    served,
)

WORKERS = (1, 2, 4, 8, 64)
LARGE = TableMix(tuple(20 + 7 * number % 40 for number in range(600)), (0,) * 300 + (1,) * 300, (1.0, 1.0))


def used(rows: Rows) -> Counter[tuple[int, int]]:
    """How often each sample is in the rows; the fill is left out."""
    return Counter((group, row) for group, row in rows.reshape(-1, 2).tolist() if group >= 0)


def every(mix: TableMix) -> list[tuple[int, int]]:
    return [(group, row) for group, count in enumerate(mix.sizes) for row in range(count)]


@st.composite
def mixes(draw: Any) -> TableMix:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=60))
    tables = draw(st.integers(1, min(3, len(sizes))))
    owners = [*range(tables), *sorted(draw(st.integers(0, tables - 1)) for _ in sizes[tables:])]
    weights = draw(st.lists(st.sampled_from([0.0, 0.3, 1.0, 1.5, 2.0]), min_size=tables, max_size=tables))
    return TableMix(tuple(sizes), tuple(owners), tuple(weights))


@settings(deadline=None, max_examples=60)
@given(mixes(), st.integers(1, 130), st.integers(0, 3))
def test_each_sample_is_used_as_often_as_its_weight_says_and_only_the_last_step_is_filled(
    mix: TableMix, global_batch: int, epoch: int
) -> None:
    order = epoch_order(mix, 3, epoch, global_batch)
    counts = used(order.rows)
    assert counts.total() == mix.epoch_samples()
    assert order.steps == mix.steps(global_batch) == math.ceil(mix.epoch_samples() / global_batch)
    assert order.rows.shape == (order.steps, global_batch, 2)
    assert (order.rows[:-1] >= 0).all()
    for table, weight in enumerate(mix.weights):
        own = [counts[group, row] for group, row in every(mix) if mix.owners[group] == table]
        assert set(own) <= {int(weight), math.ceil(weight)}
        assert sum(own) == int(weight) * len(own) + round((weight - int(weight)) * len(own))
    if order.steps:  # the fill of the last step is spread over the virtual ranks
        share = global_batch // virtual_ranks(global_batch)
        empty = (order.rows[-1, :, 0] < 0).reshape(-1, share).sum(axis=1)
        assert empty.max() - empty.min() <= 1


@pytest.mark.parametrize(
    ("global_batch", "count"),
    [(1, 1), (8, 8), (16, 16), (96, 48), (128, 64), (256, 64), (67, 1), (134, 2), (64, 64), (100, 50), (1024, 128), (1000, 125)],
)
def test_virtual_ranks_are_the_largest_divisor_up_to_64_or_an_eighth(global_batch: int, count: int) -> None:
    assert virtual_ranks(global_batch) == count


def test_the_global_batches_are_the_same_for_any_number_of_workers() -> None:
    """Also where it does not divide the 64 virtual ranks: each worker serves floor or ceil of its part of them."""
    order = epoch_order(LARGE, 5, 2, 128)
    for world in (*WORKERS, 3, 5, 7, 63):
        for step in range(order.steps):
            shares = [order.rank_rows(step, rank, world) for rank in range(world)]
            assert {len(share) for share in shares} == {2 * (64 // world), 2 * -(-64 // world)}
            assert np.array_equal(np.concatenate(shares), order.rows[step])


def test_all_workers_run_the_micro_batches_of_the_one_with_most_samples() -> None:
    block = Training(epochs=1, global_batch=12, micro_batch=2, learning_rate=0.1)
    assert [len(served(12, rank, 5)) for rank in range(5)] == [2, 2, 3, 2, 3]
    assert [micro_batches_of(block, world) for world in (1, 2, 3, 5, 12)] == [6, 3, 2, 2, 1]


@pytest.mark.parametrize("world", WORKERS)
def test_a_row_group_is_read_by_one_worker_but_for_those_that_are_cut(world: int) -> None:
    """The order before this had each of 600 row groups at nearly every worker."""
    order = epoch_order(LARGE, 5, 0, 128)
    per_rank = [
        {int(group) for step in range(order.steps) for group in order.rank_rows(step, rank, world)[:, 0] if group >= 0}
        for rank in range(world)
    ]
    readers = Counter(group for groups in per_rank for group in groups)
    assert set(readers) == set(range(600))
    assert sum(readers.values()) <= 600 + world - 1
    assert max(readers.values()) <= 2


@pytest.mark.parametrize(("global_batch", "world"), [(8, 1), (8, 2), (67, 1), (128, 1), (128, 2), (134, 1), (134, 2)])
def test_the_row_groups_that_a_worker_keeps_are_enough_to_read_each_once(global_batch: int, world: int) -> None:
    single = TableMix(tuple(1 + 5 * (number % 3) for number in range(900)), (0,) * 900, (1.0,))
    order, limit = epoch_order(single, 1, 0, global_batch), live_groups(global_batch, world)
    for rank in range(world):
        kept: dict[int, None] = {}
        reads: Counter[int] = Counter()
        for step in range(order.steps):
            current = dict.fromkeys(int(group) for group in order.rank_rows(step, rank, world)[:, 0] if group >= 0)
            for group in current:
                reads[group] += group not in kept
                kept.pop(group, None)
                kept[group] = None
            for group in list(kept)[: max(0, len(kept) - max(limit, len(current)))]:
                del kept[group]
        assert reads.total() <= len(reads) + virtual_ranks(global_batch)


def test_resuming_inside_an_epoch_continues_the_unbroken_order() -> None:
    """The order is a function of (seed, epoch): a run that starts at (epoch, index) takes the rows of the unbroken one."""
    unbroken = [epoch_order(LARGE, 7, epoch, 64).rank_rows(step, 1, 4) for epoch in range(2) for step in range(LARGE.steps(64))]
    for first in (3, LARGE.steps(64) - 1, LARGE.steps(64) + 5):
        epoch, index = divmod(first, LARGE.steps(64))
        resumed = epoch_order(LARGE, 7, epoch, 64)
        rows = [resumed.rank_rows(step, 1, 4) for step in range(index, resumed.steps)]
        assert all(np.array_equal(a, b) for a, b in zip(rows, unbroken[first:], strict=False))


def test_seeds_and_epochs_have_other_orders() -> None:
    orders = [epoch_order(LARGE, seed, epoch, 128).rows for seed in range(2) for epoch in range(2)]
    assert all((first != second).any() for at, first in enumerate(orders) for second in orders[:at])


def same_group(order: EpochOrder) -> float:
    """Share of pairs of samples of a global batch that come from one row group."""
    pairs = same = 0
    for batch in order.rows[:-1]:
        counts = np.unique(batch[:, 0], return_counts=True)[1]
        same, pairs = same + (counts * (counts - 1)).sum(), pairs + len(batch) * (len(batch) - 1)
    return same / pairs


def test_a_global_batch_is_mixed_from_many_row_groups() -> None:
    """Row groups of 152 samples, as in LLaVA-665k. Of the pairs of a batch, 1 / 1,000 would share a row group in a permutation
    of all samples, and 1 / 8 did so in windows of 8 row groups.
    """
    mix = TableMix((152,) * 1000, (0,) * 500 + (1,) * 500, (1.0, 1.0))
    orders = [epoch_order(mix, 0, epoch, 128) for epoch in range(3)]
    assert max(map(same_group, orders)) < 1 / 90
    for order in orders:
        shares = (order.rows[:-1, :, 0] >= 500).mean(axis=1)
        assert abs(shares.mean() - 0.5) < 0.02
        assert 0.8 < shares.std() / np.sqrt(0.25 / 128) < 2.0, "batches have as much of each table as those of a permutation"
    # the steps of a sample in two epochs are independent
    positions = []
    for order in orders[:2]:
        flat = order.rows.reshape(-1, 2)
        steps = np.repeat(np.arange(order.steps), 128)[flat[:, 0] >= 0]
        flat = flat[flat[:, 0] >= 0]
        positions.append(steps[np.lexsort((flat[:, 1], flat[:, 0]))])
    assert abs(np.corrcoef(*positions)[0, 1]) < 0.1


def test_rows_of_few_row_groups_are_a_permutation() -> None:
    """A small table is one row group: its order must not keep neighbours together, nor a row in a fixed virtual rank."""
    mix = TableMix((4096,), (0,), (1.0,))
    first, second = (epoch_order(mix, 0, epoch, 64).rows.reshape(-1, 2)[:, 1] for epoch in range(2))
    assert sorted(first.tolist()) == list(range(4096))
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    steps = [np.argsort(rows) // 64 for rows in (first, second)]
    shares = [np.argsort(rows) % 64 for rows in (first, second)]
    assert abs(np.corrcoef(*steps)[0, 1]) < 0.05
    assert abs(np.corrcoef(*shares)[0, 1]) < 0.05
    together = sum(len(set(first[at : at + 64].tolist()) & set(second[at : at + 64].tolist())) for at in range(0, 4096, 64))
    assert abs(together - 64) < 40, "1 in 64 samples meets the same step in the next epoch"


def test_weights_repeat_and_thin_out_tables_however_they_are_cut() -> None:
    mix = TableMix((10, 10, *[1] * 20), (0, 0, *[1] * 20), (2.0, 0.25))
    order = epoch_order(mix, 1, 0, 5)
    groups = [group for group, _ in order.rows.reshape(-1, 2).tolist()]
    assert groups.count(0) == groups.count(1) == 20
    assert sum(group > 1 for group in groups) == 5  # a quarter of 20, though each is a separate row group
    assert order.steps == mix.steps(5) == 9
    drawn = [set(used(epoch.rows)) for epoch in (order, epoch_order(mix, 1, 1, 5))]
    assert drawn[0] != drawn[1]


def test_the_order_of_millions_of_rows_takes_seconds_and_little_memory() -> None:
    """CC3M: 3.3 M rows. 16 bytes a row stay, about 150 while it is computed."""
    import tracemalloc

    mix = TableMix((80,) * 12_500, (0,) * 12_500, (1.0,))  # 1 M rows: a third
    tracemalloc.start()
    order = epoch_order(mix, 0, 0, 256)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.rows.nbytes <= 16 * 1_000_256
    assert kept < 20e6
    assert peak < 180e6
