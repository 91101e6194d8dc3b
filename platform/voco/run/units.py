"""Work in units: a work list without media bytes, cut into units, each written once (docs/data.md).

Files of LIST_UNITS units are the list: `work/list-00000.parquet` has units 0 to 255, a row group each. Unit k writes its parts
and last its record (`unit_records.py`). Resuming does the units that lack one, so the output has the same bytes after any kill.
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

from voco.errors import Refused, Stopped
from voco.job.resources import Resources
from voco.run import claim
from voco.run.logs import Progress, get_logger
from voco.run.prometheus import current_stage
from voco.run.unit_records import FinishedUnits, UnitRecords, write_record
from voco.store import parquet, storage
from voco.store.part_files import PartFiles

log = get_logger(__name__)

POOL = "voco-pool"  # label of every node of a cluster in `cluster/`: head, cpu or gpu
CPU_WORK = {POOL: "!gpu"}  # label selector of work without a GPU; it also fits nodes that have no such label
RETRIES = 8  # of a unit, or restarts of a GPU process: limited, because a unit may kill its process every time
LIST_UNITS = 256  # of a file of the work list: a process reads the file's footer, which grows with this, and its unit
WAVE_UNITS = 8192  # that Ray Data is given at once: each costs the driver 3.5 KiB and 1.4 ms before the first one starts
KEPT_S = 30.0  # that a process without work keeps its worker, and so a model, in memory


class UnitWorker(Protocol):
    """Does units: built once in each process, called for each unit."""

    def __call__(self, unit: int, work: pa.Table, /) -> dict[str, Any]:
        """Write the unit's files; return its record: {"tables": {name: [entries]}, "counts": {...}, ...}."""


def list_count_uri(output: str) -> str:
    """{"units": number}: written when every file of the work list is there."""
    return storage.join(output, "work", "list.json")


def list_file_uri(output: str, file: int) -> str:
    """The file of the work list that has units [file * LIST_UNITS, (file + 1) * LIST_UNITS)."""
    return storage.join(output, "work", f"list-{file:05d}.parquet")


def part_uri(output: str, table: str, unit: int, piece: int = 0) -> str:
    """A unit's file of a table. A unit with much data has further pieces, which sort after the first by name."""
    return storage.join(output, table, f"part-{unit:05d}_{piece:03d}.parquet" if piece else f"part-{unit:05d}.parquet")


def cut_units(rows: Iterable[dict[str, Any]], size: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows of a list in units of `size`, one table each."""
    remaining = iter(rows)
    while unit_rows := list(itertools.islice(remaining, size)):
        yield pa.Table.from_pylist(unit_rows, schema=schema)


def is_listed(output: str) -> bool:
    """True when an output's work list is complete. Raises Refused for the list of an earlier version."""
    if storage.exists(list_count_uri(output)):
        return True
    if storage.exists(storage.join(output, "work", "list.parquet")):
        raise Refused(f"output: {output} was begun by an earlier version of VoCo, whose work list is not read; use --replace")
    return False


def write_work_list(output: str, units: Iterator[pa.Table], schema: pa.Schema) -> int:
    """Write the work list, one table a unit, and return the number of units. A complete list is kept.

    What a killed process wrote is written again: the same rows give the same bytes.
    """
    if not is_listed(output):
        total = 0

        def counted(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
            nonlocal total
            for table in tables:
                yield table
                total += 1

        for first in units:
            of_file = itertools.chain([first], itertools.islice(units, LIST_UNITS - 1))
            parquet.write_table(list_file_uri(output, total // LIST_UNITS), counted(of_file), schema, statistics=False)
        storage.write_json(list_count_uri(output), {"units": total})
    return int(storage.read_json(list_count_uri(output))["units"])


class WorkList:
    """Reads units of a work list. A unit costs its bytes, and the first of a file the file's footer, however long the list is."""

    def __init__(self, output: str) -> None:
        self.output = output
        self._files = PartFiles(limit=1)  # a process does units in ascending order

    def read(self, unit: int) -> pa.Table:
        """The rows of a unit."""
        file, group = divmod(unit, LIST_UNITS)
        return self._files.read_row_group(list_file_uri(self.output, file), group)


class _UnitCall:
    """One unit in any process: read its rows of the list, do the work, then record that it is done."""

    def __init__(self, output: str, worker: type[UnitWorker], arguments: dict[str, Any]) -> None:
        self.output = output
        self.list = WorkList(output)
        self.worker = worker(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        unit = int(batch["unit"][0])
        work = self.list.read(unit)
        line = write_record(self.output, unit, self.worker(unit, work))
        return {"unit": [unit], "rows": [work.num_rows], "record": [line]}


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
) -> UnitRecords:
    """Do every unit that is not done and return all records in order; each iteration reads them again.

    `worker(**arguments)` is built once a process: here when `in_process`, else in an actor pool of Ray Data, for which the
    autoscaler starts nodes. On one machine without GPUs tasks do the units: their processes are used again by later jobs.
    """
    done = FinishedUnits(output, total)
    left = len(done.pending)
    finished = total - left
    if finished:
        log.info("%s: %d of %d units are done already", label, finished, total)
    started = time.monotonic()
    rows = size = 0
    rejected: Counter[str] = Counter()
    progress = Progress(label, total, finished)
    stage = current_stage()
    stage.set_units(finished, total)
    try:
        for count, result in enumerate(_results(output, done.pending, worker, arguments, resources, in_process), start=1):
            line = str(result["record"][0])
            done.add(int(result["unit"][0]), line)
            record = json.loads(line)
            rows += int(result["rows"][0])
            size += sum(entry["bytes"] for entries in record["tables"].values() for entry in entries)
            unit_rejects = reject_reasons(record)
            rejected.update(unit_rejects)
            stage.set_units(finished + count, total)
            stage.count_rows(*row_counts(record), unit_rejects)
            seconds = time.monotonic() - started
            rate = f"{rows:,} rows, {rows / seconds:,.0f} rows/s, {size / 1e6:,.1f} MB, {size / seconds / 1e6:,.1f} MB/s"
            reasons = "".join(f", {reason} {number:,}" for reason, number in sorted(rejected.items()))
            expected = seconds / count * (left - count)
            text = f"unit {finished + count}/{total}, {rate}{reasons}, {seconds:.0f} s, {expected:.0f} s left"
            progress.update(finished + count, text)
            if claim.is_stopping() and count < left:
                stop = f"{label}: stopped after unit {finished + count} of {total}"
                raise Stopped(f"{stop}; submitted again, it continues there")
    finally:
        progress.close()
    return UnitRecords(output)


def reject_reasons(record: dict[str, Any]) -> Counter[str]:
    """What a unit rejected, by reason: counts of ingest, rows of a frame cache, images of features and answers."""
    reasons = Counter(record.get("rejected", {}))
    reasons.update(reject["reason"] for reject in record.get("rejects", []))
    return reasons + Counter(corrupt_media=len(record.get("bad", [])))


def row_counts(record: dict[str, Any]) -> tuple[int, int]:
    """Rows that a unit has read and written; ingest has read what it wrote or rejected."""
    counts = record.get("counts", {})
    written = counts.get("written", record.get("written", 0))
    return counts.get("read", written + sum(record.get("rejected", {}).values())), written


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
    for start in range(0, len(pending), WAVE_UNITS):
        yield from _wave_results(output, pending[start : start + WAVE_UNITS], worker, arguments, resources)


def _wave_results(
    output: str, pending: list[int], worker: type[UnitWorker], arguments: dict[str, Any], resources: Resources
) -> Iterator[dict[str, Any]]:
    """The results of units that Ray Data is given at once, about in their order. It keeps an object for each of them."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # progress is reported above, in units
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1  # a unit may take longer than Ray's half hour
    context.max_consecutive_actor_init_deaths = 3
    dataset = ray.data.from_items([{"unit": unit} for unit in pending], override_num_blocks=len(pending))
    size = min(resources.most_workers, len(pending))
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
