"""Work lists in files, and records of finished units in blocks: every kill leaves a state from which the same bytes follow."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from voco.errors import Refused
from voco.job.resources import Resources
from voco.run import unit_records, units
from voco.run.unit_records import FinishedUnits, UnitRecords, forget_units, write_record
from voco.store import parquet, storage

SCHEMA = pa.schema([("number", pa.int64())])
UNITS = 11  # two full blocks of four, and three units
LINE_ENDS = "a\u2028b\x85c\nd\re"


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


class Writing:
    """Writes a part and counts how often each unit was done."""

    done: ClassVar[Counter[int]] = Counter()

    def __init__(self, output: str) -> None:
        self.output = output

    def __call__(self, unit: int, work: pa.Table) -> dict[str, Any]:
        entry = parquet.write_table(units.part_uri(self.output, "numbers", unit), [work], SCHEMA)
        self.done[unit] += 1
        return {"tables": {"numbers": [entry]}, "rejected": {"odd": unit % 2}, "text": LINE_ENDS}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_records, "RECORD_UNITS", 4)
    monkeypatch.setattr(units, "LIST_UNITS", 4)
    Writing.done.clear()


def tables(count: int = UNITS) -> Iterator[pa.Table]:
    return units.cut_units(({"number": number} for number in range(2 * count)), 2, SCHEMA)


def run(output: Path) -> UnitRecords:
    count = units.write_work_list(str(output), tables(), SCHEMA)
    return units.run_units(str(output), count, Writing, {"output": str(output)}, Resources(), True, "test")


def files(output: Path) -> dict[str, bytes]:
    """Every file, those that killed writes left included."""
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


class Steps:
    """Counts what changes the disk, and ends the process before or after step `last`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int, after: bool) -> None:
        self.number, self.last, self.after = 0, last, after
        for owner, name in ((os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, call: Any) -> Any:
        def step(*arguments: Any, **named: Any) -> Any:
            if self.number > self.last >= 0:
                return None  # the process has ended: its clean-up does not happen either
            self.number += 1
            if self.number > self.last >= 0:
                if self.after:
                    call(*arguments, **named)
                raise Killed
            return call(*arguments, **named)

        return step


def steps_of(call: Any) -> int:
    """How many steps a call takes."""
    with pytest.MonkeyPatch.context() as patch:
        counter = Steps(patch, -1, False)
        call()
    return counter.number


def is_killed(call: Any, last: int, after: bool) -> bool:
    """Call with an end of the process at a step; True when it came."""
    with pytest.MonkeyPatch.context() as patch:
        Steps(patch, last, after)
        try:
            call()
        except Killed:
            return True
    return False


def without_partials(output: Path) -> dict[str, bytes]:
    storage.delete_partials(str(output))  # as the manifest's writer does
    return files(output)


def test_a_kill_at_every_step_of_a_run_leads_to_the_same_files(tmp_path: Path) -> None:
    steps = steps_of(lambda: run(tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    assert {name for name in whole if name.startswith("units/")} == {
        "units/00000-00003.jsonl.zst", "units/00004-00007.jsonl.zst", "units/00008.json", "units/00009.json", "units/00010.json",
    }  # fmt: skip
    assert [name for name in whole if name.startswith("work/")] == ["work/list-00000.parquet", "work/list-00001.parquet",
                                                                     "work/list-00002.parquet", "work/list.json"]  # fmt: skip
    assert steps > 2 * UNITS + 8
    for last in range(steps):
        for after in (False, True):
            output = tmp_path / f"killed-{last}-{after}"
            Writing.done.clear()
            assert is_killed(lambda output=output: run(output), last, after)
            recorded = {record["unit"] for record in UnitRecords(str(output))}
            earlier = Writing.done.copy()
            records = list(run(output))
            assert [record["unit"] for record in records] == list(range(UNITS))
            assert {record["text"] for record in records} == {LINE_ENDS}
            assert without_partials(output) == whole, f"step {last}"
            assert all(Writing.done[unit] == earlier[unit] for unit in recorded), "a recorded unit was done again"


def test_a_kill_at_every_step_of_forgetting(tmp_path: Path) -> None:
    """What is forgotten runs again, and nothing else; after a kill a block has forgotten all of its units or none."""
    run(tmp_path / "whole")
    whole = files(tmp_path / "whole")
    forgotten = {1, 3, 6, 9}

    def again(output: Path, last: int = -1, after: bool = False) -> set[int]:
        run(output)
        assert is_killed(lambda: forget_units(str(output), forgotten), last, after) == (last >= 0)
        pending = set(FinishedUnits(str(output), UNITS).pending)
        assert pending <= forgotten
        Writing.done.clear()
        run(output)
        assert set(Writing.done) == pending
        assert without_partials(output) == whole
        return pending

    assert again(tmp_path / "all") == forgotten
    steps = steps_of(lambda: forget_units(str(tmp_path / "whole"), forgotten))
    for last in range(steps):
        for after in (False, True):
            again(tmp_path / f"killed-{last}-{after}", last, after)


def test_records_are_taken_in_any_order_and_from_earlier_runs(tmp_path: Path) -> None:
    output = str(tmp_path)
    for unit in (2, 7):
        write_record(output, unit, {"value": unit})
    done = FinishedUnits(output, 9)
    assert done.pending == [0, 1, 3, 4, 5, 6, 8]
    order = [8, 6, 5, 4, 3, 1, 0]
    for unit in order:
        done.add(unit, write_record(output, unit, {"value": unit}))
        finished = sorted({2, 7, *order[: order.index(unit) + 1]})
        assert [(record["unit"], record["value"]) for record in UnitRecords(output)] == [(number, number) for number in finished]
    assert storage.list_names(f"{output}/units") == ["00000-00003.jsonl.zst", "00004-00007.jsonl.zst", "00008.json"]
    assert FinishedUnits(output, 9).pending == []


def test_a_list_that_fails_is_not_complete_and_is_written_again(tmp_path: Path) -> None:
    units.write_work_list(str(tmp_path / "whole"), tables(), SCHEMA)

    def broken() -> Iterator[pa.Table]:
        yield from (table for table, _ in zip(tables(), range(6), strict=False))
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        units.write_work_list(str(tmp_path / "out"), broken(), SCHEMA)
    assert list(files(tmp_path / "out")) == ["work/list-00000.parquet"]
    assert not units.is_listed(str(tmp_path / "out"))
    assert units.write_work_list(str(tmp_path / "out"), tables(), SCHEMA) == UNITS
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert units.write_work_list(str(tmp_path / "out"), broken(), SCHEMA) == UNITS, "a complete list is kept"
    for count in (0, 4, 8):
        output = str(tmp_path / str(count))
        assert units.write_work_list(output, tables(count), SCHEMA) == count
        assert len(storage.list_names(f"{output}/work")) == count // 4 + 1


def test_a_unit_reads_its_file_only(tmp_path: Path) -> None:
    units.write_work_list(str(tmp_path), tables(), SCHEMA)
    for name in ("list-00000.parquet", "list-00002.parquet"):
        (tmp_path / "work" / name).write_bytes(b"not read")
    listed = units.WorkList(str(tmp_path))
    for unit in (4, 7, 5):
        assert listed.read(unit)["number"].to_pylist() == [2 * unit, 2 * unit + 1]
    with pytest.raises(ValueError, match="not a Parquet file"):
        listed.read(8)


def test_the_list_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "work" / "list.parquet"), b"PAR1")
    with pytest.raises(Refused, match=r"begun by an earlier version.*--replace"):
        units.write_work_list(str(tmp_path), tables(), SCHEMA)
