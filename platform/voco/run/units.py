"""Work in units: a work list without media bytes, cut into units, each written once (docs/data.md).

`work/list.parquet` is the list; its row group k is unit k. Unit k writes its parts and last `units/k.json`. Resuming does
the units that lack this file, so the output has the same bytes after any kill.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from voco.errors import Stopped
from voco.job.config import Resources
from voco.run import claim
from voco.run.logs import Progress, get_logger
from voco.store import parquet, storage

log = get_logger(__name__)

POOL = "voco-pool"  # label of every node of a cluster in `cluster/`: head, cpu or gpu
CPU_WORK = {POOL: "!gpu"}  # label selector of work without a GPU; it also fits nodes that have no such label
RETRIES = 8  # of a unit, or restarts of a GPU process: limited, because a unit may kill its process every time
KEPT_S = 30.0  # that a process without work keeps its worker, and so a model, in memory


class UnitWorker(Protocol):
    """Does units: built once in each process, called for each unit."""

    def __call__(self, unit: int, work: pa.Table, /) -> dict[str, Any]:
        """Write the unit's files; return its record: {"tables": {name: [entries]}, "counts": {...}, ...}."""


def work_list_uri(output: str) -> str:
    return storage.join(output, "work", "list.parquet")


def part_uri(output: str, table: str, unit: int, piece: int = 0) -> str:
    """A unit's file of a table. A unit with much data has further pieces, which sort after the first by name."""
    return storage.join(output, table, f"part-{unit:05d}_{piece:03d}.parquet" if piece else f"part-{unit:05d}.parquet")


def cut_units(rows: Iterable[dict[str, Any]], size: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows of a list in units of `size`, one table each."""
    remaining = iter(rows)
    while unit_rows := list(itertools.islice(remaining, size)):
        yield pa.Table.from_pylist(unit_rows, schema=schema)


def write_work_list(output: str, units: Iterator[pa.Table], schema: pa.Schema) -> int:
    """Write the work list, one table a unit, and return the number of units. An existing list is kept."""
    if not storage.exists(work_list_uri(output)):
        parquet.write_table(work_list_uri(output), units, schema)
    with parquet.open_parquet(work_list_uri(output)) as file:
        return int(file.num_row_groups)


def unit_record_uri(output: str, unit: int) -> str:
    return storage.join(output, "units", f"{unit:05d}.json")


def unit_records(output: str) -> list[dict[str, Any]]:
    """The records of all finished units, in order."""
    folder = storage.join(output, "units")
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]  # a kill may leave a partial file
    return [storage.read_json(storage.join(folder, name)) for name in names]


def pending_units(output: str, total: int) -> list[int]:
    done = set(storage.list_names(storage.join(output, "units")))
    return [unit for unit in range(total) if f"{unit:05d}.json" not in done]


class _UnitCall:
    """One unit in any process: read its rows of the list, do the work, then record that it is done."""

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


class _ProcessWorker:
    """The unit worker of this process. Ray uses a process again for later units, and for later jobs of the same driver.

    So a flow's evaluations import torch once a process instead of once a job. An idle process holds no resources of the
    cluster, and after KEPT_S no model either.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[Any, ...] | None = None
        self._call: _UnitCall | None = None
        self._timer: threading.Timer | None = None

    def do_unit(self, batch: dict[str, Any], output: str, worker: type[UnitWorker], arguments: dict[str, Any]) -> dict[str, Any]:
        """As `_UnitCall`; the worker of the last call is used again when it was built with the same arguments."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            key = (output, worker, arguments)
            if self._call is None or self._key != key:
                self._drop()  # first, so that two models are never in memory
                self._call, self._key = _UnitCall(output, worker, arguments), key
            try:
                result = self._call(batch)
            except BaseException:
                self._drop()
                raise
            self._timer = threading.Timer(KEPT_S, self._drop_idle)
            self._timer.daemon = True
            self._timer.start()
            return result

    def _drop_idle(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._call = self._key = None


_process_worker = _ProcessWorker()


def do_unit(batch: dict[str, Any], output: str, worker: type[UnitWorker], arguments: dict[str, Any]) -> dict[str, Any]:
    """A task of Ray Data: one unit, by this process's worker."""
    return _process_worker.do_unit(batch, output, worker, arguments)


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

    `worker(**arguments)` is built once a process: here when `in_process`, else in an actor pool of Ray Data, for which the
    autoscaler starts nodes. On one machine without GPUs tasks do the units: their processes are used again by later jobs.
    """
    pending = pending_units(output, total)
    finished = total - len(pending)
    if finished:
        log.info("%s: %d of %d units are done already", label, finished, total)
    started = time.monotonic()
    rows = size = 0
    rejected: Counter[str] = Counter()
    progress = Progress(label, total, finished)
    try:
        for done, result in enumerate(_results(output, pending, worker, arguments, resources, in_process), start=1):
            rows += int(result["rows"][0])
            size += int(result["bytes"][0])
            rejected.update(json.loads(result["rejected"][0]))
            seconds = time.monotonic() - started
            rate = f"{rows:,} rows, {rows / seconds:,.0f} rows/s, {size / 1e6:,.1f} MB, {size / seconds / 1e6:,.1f} MB/s"
            reasons = "".join(f", {reason} {count:,}" for reason, count in sorted(rejected.items()))
            left = seconds / done * (len(pending) - done)
            text = f"unit {finished + done}/{total}, {rate}{reasons}, {seconds:.0f} s, {left:.0f} s left"
            progress.update(finished + done, text)
            if claim.is_stopping() and done < len(pending):
                stop = f"{label}: stopped after unit {finished + done} of {total}"
                raise Stopped(f"{stop}; submitted again, it continues there")
    finally:
        progress.close()
    return unit_records(output)


def _results(
    output: str,
    pending: list[int],
    worker: type[UnitWorker],
    arguments: dict[str, Any],
    resources: Resources,
    in_process: bool,
) -> Iterator[dict[str, Any]]:
    """The result of `_UnitCall` for each unit, as units end."""
    if not pending:
        return
    if in_process:
        call = _UnitCall(output, worker, arguments)
        for unit in pending:
            yield call({"unit": [unit]})
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # progress is reported above, in units
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1  # a unit may take longer than Ray's half hour
    context.max_consecutive_actor_init_deaths = 3
    dataset = ray.data.from_items([{"unit": unit} for unit in pending], override_num_blocks=len(pending))
    size = min(resources.workers, len(pending))
    options: dict[str, Any] = {"batch_size": 1, "batch_format": "numpy", "num_cpus": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        options |= {"num_gpus": resources.gpus_per_worker, "accelerator_type": resources.accelerator}
    else:
        # CPU work fills CPU nodes and waits; without the selector it would make the autoscaler start GPU nodes
        options["label_selector"] = CPU_WORK
    with warnings.catch_warnings():
        # neither retry option has a named parameter in Ray 2.60, and passing it another way is deprecated
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        if resources.gpus_per_worker or not is_one_node(size * resources.cpus_per_worker):
            dataset = dataset.map_batches(
                _UnitCall,
                fn_constructor_args=(output, worker, arguments),
                compute=ray.data.ActorPoolStrategy(size=size),
                max_restarts=RETRIES,  # retries of a unit have no limit: many fail before a node is known to be dead
                **options,
            )
        else:
            dataset = dataset.map_batches(
                do_unit,
                fn_args=(output, worker, arguments),
                compute=ray.data.TaskPoolStrategy(size=size),
                max_retries=RETRIES,
                **options,
            )
    yield from dataset.iter_batches(batch_size=1, prefetch_batches=0)


def is_one_node(cpus: float = 0) -> bool:
    """True for a cluster of one machine that has so many CPUs."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return len(nodes) == 1 and nodes[0]["Resources"].get("CPU", 0) >= cpus
