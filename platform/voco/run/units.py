"""Work in units: a list without bytes, cut into units, each written once (design section 4).

`work/list.parquet` holds the list; its row group k is unit k. Unit k writes its parts and last `units/k.json`, so
resuming means the units without that file, and the output is the same bytes after any kill.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from voco.errors import Stopped
from voco.job.config import Resources
from voco.run import claim
from voco.store import parquet, storage

POOL = "voco-pool"  # label of every node of a cluster in `cluster/`: head, cpu or gpu
CPU_WORK = {POOL: "!gpu"}  # label selector of work without a GPU; it also fits nodes that have no such label


class UnitWorker(Protocol):
    """What a unit is done by: built once in each process, called for each unit."""

    def __call__(self, unit: int, work: pa.Table, /) -> dict[str, Any]:
        """Write the unit's files; return its record: {"tables": {name: [entries]}, "counts": {...}, ...}."""


def work_list_uri(output: str) -> str:
    return storage.join(output, "work", "list.parquet")


def part_uri(output: str, table: str, unit: int, piece: int = 0) -> str:
    """A unit's file of a table. A unit with much in it has further pieces, which stand behind the first one by name."""
    return storage.join(output, table, f"part-{unit:05d}_{piece:03d}.parquet" if piece else f"part-{unit:05d}.parquet")


def cut_units(listed: Iterable[dict[str, Any]], size: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows of a list in units of `size`, one table each."""
    rest = iter(listed)
    while held := list(itertools.islice(rest, size)):
        yield pa.Table.from_pylist(held, schema=schema)


def write_work_list(output: str, units: Iterator[pa.Table], schema: pa.Schema) -> int:
    """Write the work list, one table a unit, and return the number of units. A list that is there is kept."""
    if not storage.exists(work_list_uri(output)):
        parquet.write_table(work_list_uri(output), units, schema)
    with parquet.open_parquet(work_list_uri(output)) as file:
        return int(file.num_row_groups)


def unit_record_uri(output: str, unit: int) -> str:
    return storage.join(output, "units", f"{unit:05d}.json")


def unit_records(output: str) -> list[dict[str, Any]]:
    """The records of all finished units, in order."""
    folder = storage.join(output, "units")
    whole = [name for name in storage.list_names(folder) if name.endswith(".json")]  # a kill may leave a partial file beside them
    return [storage.read_json(storage.join(folder, name)) for name in whole]


def pending_units(output: str, total: int) -> list[int]:
    done = set(storage.list_names(storage.join(output, "units")))
    return [unit for unit in range(total) if f"{unit:05d}.json" not in done]


class _UnitCall:
    """One unit in whatever process: read its slice of the list, work, then say that it is done."""

    def __init__(self, output: str, worker: type[UnitWorker], arguments: dict[str, Any]) -> None:
        self.output = output
        self.worker = worker(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        unit = int(batch["unit"][0])
        with parquet.open_parquet(work_list_uri(self.output)) as file:
            work = file.read_row_group(unit)
        record = self.worker(unit, work)
        storage.write_json(unit_record_uri(self.output, unit), {"unit": unit, **record})
        written = sum(entry["bytes"] for entries in record["tables"].values() for entry in entries)
        return {"rows": [work.num_rows], "bytes": [written], "rejected": [json.dumps(record.get("rejected", {}))]}


def run_units(
    output: str,
    total: int,
    worker: type[UnitWorker],
    arguments: dict[str, Any],
    resources: Resources,
    in_process: bool,
    label: str,
) -> list[dict[str, Any]]:
    """Do every unit that is not done and return all records in order.

    `worker(**arguments)` is built once a process: here when `in_process`, else in an actor pool of Ray Data.
    """
    todo = pending_units(output, total)
    if len(todo) < total:
        print(f"{label}: {total - len(todo)} of {total} units are done already", flush=True)
    started = time.monotonic()
    read = size = 0
    rejected: Counter[str] = Counter()
    for done, call in enumerate(_calls(output, todo, worker, arguments, resources, in_process), start=1):
        read += int(call["rows"][0])
        size += int(call["bytes"][0])
        rejected.update(json.loads(call["rejected"][0]))
        spent = time.monotonic() - started
        left = spent / done * (len(todo) - done)
        rate = f"{read:,} rows, {read / spent:,.0f} rows/s, {size / 1e6:,.1f} MB, {size / spent / 1e6:,.1f} MB/s"
        lost = "".join(f", {reason} {count:,}" for reason, count in sorted(rejected.items()))
        print(f"{label}: unit {total - len(todo) + done}/{total}, {rate}{lost}, {spent:.0f} s, {left:.0f} s left", flush=True)
        if claim.is_stopping() and done < len(todo):
            raise Stopped(f"{label}: stopped after unit {total - len(todo) + done} of {total}; sent again, it continues there")
    return unit_records(output)


def _calls(
    output: str, todo: list[int], worker: type[UnitWorker], arguments: dict[str, Any], resources: Resources, in_process: bool
) -> Iterator[dict[str, Any]]:
    """What `_UnitCall` returned for each unit, as units end."""
    if not todo:
        return
    if in_process:
        call = _UnitCall(output, worker, arguments)
        for unit in todo:
            yield call({"unit": [unit]})
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # progress is told above, in units
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1  # a unit may take longer than Ray's half hour
    context.max_consecutive_actor_init_deaths = 3
    pool = min(resources.workers, len(todo))
    dataset = ray.data.from_items([{"unit": unit} for unit in todo], override_num_blocks=len(todo)).map_batches(
        _UnitCall,
        fn_constructor_args=(output, worker, arguments),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=pool),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        accelerator_type=resources.accelerator,
        # CPU work fills CPU nodes and waits; without the selector it would make the autoscaler start GPU nodes
        label_selector=None if resources.gpus_per_worker else CPU_WORK,
        max_restarts=8,  # not without end: a unit may kill its process. Retries have none: many fail before a node is known dead
    )
    yield from dataset.iter_batches(batch_size=1, prefetch_batches=0)
