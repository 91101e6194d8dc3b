"""A process does units of later jobs with what it has imported, and keeps no model in memory for longer than it is used."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from voco.job.resources import Resources
from voco.run import units
from voco.run.unit_records import UnitRecords

SCHEMA = pa.schema([("number", pa.int64())])


class Doubling:
    """Writes nothing; its record has what it was built with, its process, and how many workers that process has built."""

    built = 0

    def __init__(self, factor: int, output: str) -> None:
        type(self).built += 1
        self.factor = factor

    def __call__(self, unit: int, work: pa.Table) -> dict[str, Any]:
        numbers = [self.factor * number for number in work["number"].to_pylist()]
        if numbers == [0]:
            raise ValueError("no zero")
        return {"tables": {}, "counts": {}, "numbers": numbers, "pid": os.getpid(), "built": self.built}


def work_list(output: Path, numbers: list[int]) -> int:
    rows = units.cut_units(({"number": number} for number in numbers), 1, SCHEMA)
    return units.write_work_list(str(output), rows, SCHEMA)


def run(output: Path, factor: int, workers: int = 1) -> UnitRecords:
    count = work_list(output, [1, 2, 3, 4])
    arguments = {"factor": factor, "output": str(output)}
    return units.run_units(str(output), count, Doubling, arguments, Resources(workers=workers), False, "test")


@pytest.mark.ray
def test_two_jobs_use_the_same_processes(ray_local: str, tmp_path: Path) -> None:
    first, second = run(tmp_path / "first", 2), run(tmp_path / "second", 3)
    assert [record["numbers"] for record in first] == [[2], [4], [6], [8]]
    assert [record["numbers"] for record in second] == [[3], [6], [9], [12]]
    assert {record["pid"] for record in first} == {record["pid"] for record in second} != {os.getpid()}
    assert {record["built"] for record in first} == {1}
    assert {record["built"] for record in second} == {2}


@pytest.mark.ray
def test_units_in_several_waves(ray_local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data gets three units at a time: every unit is done once, and starts in the order of the list."""
    monkeypatch.setattr(units, "WAVE_UNITS", 3)
    numbers = list(range(1, 9))
    records = units.run_units(
        str(tmp_path),
        work_list(tmp_path, numbers),
        Doubling,
        {"factor": 2, "output": str(tmp_path)},
        Resources(workers=1),
        False,
        "test",
    )
    assert [record["numbers"] for record in records] == [[2 * number] for number in numbers]
    written = [(tmp_path / "units" / f"{unit:05d}.json").stat().st_mtime_ns for unit in range(8)]
    assert written == sorted(written)


@pytest.fixture
def process_worker() -> units._ProcessWorker:
    return units._ProcessWorker()


def do_unit(process_worker: units._ProcessWorker, output: Path, unit: int, factor: int) -> None:
    process_worker.do_unit({"unit": [unit]}, str(output), Doubling, {"factor": factor, "output": str(output)})


def test_a_worker_is_kept_for_equal_arguments_only(process_worker: units._ProcessWorker, tmp_path: Path) -> None:
    work_list(tmp_path, [1, 2, 3])
    do_unit(process_worker, tmp_path, 0, 2)
    kept = process_worker._call
    do_unit(process_worker, tmp_path, 1, 2)
    assert process_worker._call is kept
    do_unit(process_worker, tmp_path, 2, 5)
    assert process_worker._call is not kept


def test_an_idle_process_and_one_that_failed_keep_no_worker(
    process_worker: units._ProcessWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_list(tmp_path, [0, 1])
    with pytest.raises(ValueError, match="no zero"):
        do_unit(process_worker, tmp_path, 0, 2)
    assert process_worker._call is None
    monkeypatch.setattr(units, "KEPT_S", 0.05)
    do_unit(process_worker, tmp_path, 1, 2)
    deadline = time.monotonic() + 30
    while process_worker._call is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
