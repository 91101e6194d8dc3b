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

from voco import rows, running, storage
from voco.blocks import Resources
from voco.errors import Stopped

# A row of `samples/` tables, by the place where it stands.
SAMPLE_LIST = pa.schema([("part", pa.string()), ("group", pa.int32()), ("row", pa.int32())])


def sample_rows(samples: list[str], with_media: bool = False) -> Iterator[dict[str, Any]]:
    """Every row of the `samples/` tables, or every one that has media, as rows of `SAMPLE_LIST`, with their `sample_id`."""
    for uri in samples:
        folder = storage.join(uri, "samples")
        for name in storage.names(folder):
            place = storage.join(folder, name)
            with rows.open_parquet(place) as file:
                for group in range(file.num_row_groups):
                    held = file.read_row_group(group, columns=["sample_id", "modality"])
                    for row, modality in enumerate(held["modality"].to_pylist()):
                        if modality != "text" or not with_media:
                            yield {"part": place, "group": group, "row": row, "sample_id": held["sample_id"][row].as_py()}


POOL = "voco-pool"  # label of every node of a cluster in `cluster/`: head, cpu or gpu
CPU_WORK = {POOL: "!gpu"}  # label selector of work without a GPU; it also fits nodes that have no such label


class Worker(Protocol):
    """What a unit is done by: built once in each process, called for each unit."""

    def __call__(self, unit: int, work: pa.Table, /) -> dict[str, Any]:
        """Write the unit's files; return its record: {"tables": {name: [entries]}, "counts": {...}, ...}."""


def list_uri(output: str) -> str:
    return storage.join(output, "work", "list.parquet")


def part(output: str, table: str, unit: int, piece: int = 0) -> str:
    """A unit's file of a table. A unit with much in it has further pieces, which stand behind the first one by name."""
    return storage.join(output, table, f"part-{unit:05d}_{piece:03d}.parquet" if piece else f"part-{unit:05d}.parquet")


def cut(listed: Iterable[dict[str, Any]], size: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows of a list in units of `size`, one table each."""
    rest = iter(listed)
    while held := list(itertools.islice(rest, size)):
        yield pa.Table.from_pylist(held, schema=schema)


def write_list(output: str, units: Iterator[pa.Table], schema: pa.Schema) -> int:
    """Write the work list, one table a unit, and return the number of units. A list that is there is kept."""
    if not storage.exists(list_uri(output)):
        rows.write_table(list_uri(output), units, schema)
    with rows.open_parquet(list_uri(output)) as file:
        return int(file.num_row_groups)


def record_uri(output: str, unit: int) -> str:
    return storage.join(output, "units", f"{unit:05d}.json")


def records(output: str) -> list[dict[str, Any]]:
    """The records of all finished units, in order."""
    folder = storage.join(output, "units")
    whole = [name for name in storage.names(folder) if name.endswith(".json")]  # a kill may leave a partial file beside them
    return [storage.read_json(storage.join(folder, name)) for name in whole]


def pending(output: str, total: int) -> list[int]:
    done = set(storage.names(storage.join(output, "units")))
    return [unit for unit in range(total) if f"{unit:05d}.json" not in done]


class _UnitCall:
    """One unit in whatever process: read its slice of the list, work, then say that it is done."""

    def __init__(self, output: str, worker: type[Worker], arguments: dict[str, Any]) -> None:
        self.output = output
        self.worker = worker(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        unit = int(batch["unit"][0])
        with rows.open_parquet(list_uri(self.output)) as file:
            work = file.read_row_group(unit)
        record = self.worker(unit, work)
        storage.write_json(record_uri(self.output, unit), {"unit": unit, **record})
        written = sum(entry["bytes"] for entries in record["tables"].values() for entry in entries)
        return {"rows": [work.num_rows], "bytes": [written], "rejected": [json.dumps(record.get("rejected", {}))]}


def run(
    output: str, total: int, worker: type[Worker], arguments: dict[str, Any], resources: Resources, in_process: bool, label: str
) -> list[dict[str, Any]]:
    """Do every unit that is not done and return all records in order.

    `worker(**arguments)` is built once a process: here when `in_process`, else in an actor pool of Ray Data.
    """
    todo = pending(output, total)
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
        if running.stopping() and done < len(todo):
            raise Stopped(f"{label}: stopped after unit {total - len(todo) + done} of {total}; sent again, it continues there")
    return records(output)


def _calls(
    output: str, todo: list[int], worker: type[Worker], arguments: dict[str, Any], resources: Resources, in_process: bool
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
