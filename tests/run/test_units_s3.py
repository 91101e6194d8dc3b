"""Work lists and records on a real S3 server, with every request seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from voco.run import unit_records, units
from voco.run.unit_records import FinishedUnits, UnitRecords, forget_units, write_record
from voco.store import storage
from voco.store.s3 import PatientS3

pytestmark = pytest.mark.cluster

SCHEMA = pa.schema([("number", pa.int64())])


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Method, key and range of every request from now on."""
    seen: list[tuple[str, str, str]] = []
    original = PatientS3._call_s3

    async def counted(self: PatientS3, method: str, *arguments: Any, **named: Any) -> Any:
        seen.append((method, str(named.get("Key", "")), str(named.get("Range", ""))))
        return await original(self, method, *arguments, **named)

    monkeypatch.setattr(PatientS3, "_call_s3", counted)
    return seen


def test_a_unit_costs_the_same_in_a_long_list(s3_server: Path, requests: list[tuple[str, str, str]]) -> None:
    (s3_server / "lists").mkdir()
    counts = {}
    for length in (300, 3000):
        output = f"s3://lists/{length}"
        rows = ({"number": number} for number in range(length))
        assert units.write_work_list(output, units.cut_units(rows, 1, SCHEMA), SCHEMA) == length
        requests.clear()
        listed = units.WorkList(output)
        assert listed.read(258)["number"].to_pylist() == [258]
        assert {key for _, key, _ in requests} == {f"{length}/work/list-00001.parquet"}
        counts[length] = len(requests)
        requests.clear()
        assert listed.read(259)["number"].to_pylist() == [259]
        ((method, _, read),) = requests
        assert method == "get_object"
        first, last = map(int, read.removeprefix("bytes=").split("-"))
        assert last - first < 1000, "the rows of the unit, and nothing else"
    assert counts[300] == counts[3000] <= 3


def test_records_are_merged_and_forgotten(
    s3_server: Path, requests: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (s3_server / "records").mkdir()
    monkeypatch.setattr(unit_records, "RECORD_UNITS", 50)
    output, total = "s3://records/out", 120
    done = FinishedUnits(output, total)
    for unit in done.pending:
        done.add(unit, write_record(output, unit, {"value": unit}))
    names = storage.list_names(f"{output}/units")
    assert names == ["00000-00049.jsonl.zst", "00050-00099.jsonl.zst", *(f"{unit:05d}.json" for unit in range(100, 120))]
    assert [record["value"] for record in UnitRecords(output)] == list(range(total))
    forget_units(output, {7, 55, 119})
    requests.clear()
    assert FinishedUnits(output, total).pending == [7, 55, 119]
    assert [method for method, *_ in requests].count("get_object") == 2
    assert len(requests) <= 4, "a listing and two blocks, no request for each unit"
    requests.clear()
    assert len(list(UnitRecords(output))) == total - 3
    assert "head_object" not in {method for method, *_ in requests}
