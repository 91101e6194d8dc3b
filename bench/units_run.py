"""The children of bench/units.py: each prints one JSON object. The functions named `earlier_` run under 134c529's source."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

ROWS = 50  # of a unit, the default of frame caches
TOTAL = 200_000  # units of the output that is resumed
PENDING = 300
EARLIER_RECORDS = 500
RECORD = {
    "tables": {
        "samples": [{"path": "part-000000.parquet", "rows": 500, "bytes": 123_456_789, "sha256": "0" * 64}],
        "rejects": [{"path": "part-000000.parquet", "rows": 3, "bytes": 1_234, "sha256": "1" * 64}],
        "blobs": [],
    },
    "written": 500,
    "rejected": {"missing_media": 3},
    "spread": {
        name: {"count": 500, "sum": 123_456, "min": 1, "max": 5_000}
        for name in ("media_bytes", "conversations", "turns", "text_bytes", "width", "height", "duration_s", "fps", "num_frames")
    },
    "kinds": {"modality.video": 500, "format.mp4": 500},
}  # fmt: skip


def work_rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows of a frame cache's work list: addresses of samples."""
    for number in range(count):
        part, row = divmod(number, 500)
        group, row = divmod(row, 4)
        yield {"part": f"s3://bucket/webvid/samples/part-{part:05d}.parquet", "group": group, "row": row}


def write_list(output: str, length: int) -> dict[str, Any]:
    from voco.run import units
    from voco.store.samples import ROW_ADDRESS

    started = time.monotonic()
    units.write_work_list(output, units.cut_units(work_rows(length * ROWS), ROWS, ROW_ADDRESS), ROW_ADDRESS)
    return {"seconds": time.monotonic() - started}


def earlier_write_list(output: str, length: int) -> dict[str, Any]:
    from voco import work

    started = time.monotonic()
    work.write_list(output, work.cut(work_rows(length * ROWS), ROWS, work.SAMPLE_LIST), work.SAMPLE_LIST)
    return {"seconds": time.monotonic() - started}


def read_unit(output: str, unit: int) -> dict[str, Any]:
    """Time of one unit's rows in a process that has read nothing yet, but has a connection; and what the rows are."""
    from voco.run import units
    from voco.store import storage

    storage.list_names(output)
    started = time.monotonic()
    table = units.WorkList(output).read(unit)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "rows": hashlib.sha256(json.dumps(table.to_pylist()).encode()).hexdigest()}


def earlier_read_unit(output: str, unit: int) -> dict[str, Any]:
    from voco import rows, storage, work

    storage.names(output)
    started = time.monotonic()
    with rows.open_parquet(work.list_uri(output)) as file:
        table = file.read_row_group(unit)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "rows": hashlib.sha256(json.dumps(table.to_pylist()).encode()).hexdigest()}


def write_records(output: str) -> dict[str, Any]:
    """The records of TOTAL units but PENDING of two or three blocks, as a killed driver leaves them."""
    from voco.run.unit_records import RECORD_UNITS, FinishedUnits, write_record

    line = write_record(output, 0, RECORD)
    done = FinishedUnits(output, TOTAL)
    first = TOTAL // 2
    skipped = range(first, first + 2 * PENDING, 2)
    open_blocks = {unit // RECORD_UNITS for unit in skipped} | {TOTAL // RECORD_UNITS}
    for unit in range(1, TOTAL):
        if unit not in skipped:
            text = line.replace('"unit": 0,', f'"unit": {unit},', 1).replace("part-000000", f"part-{unit:06d}")
            done.add(unit, write_record(output, unit, RECORD) if unit // RECORD_UNITS in open_blocks else text)
    return {}


def earlier_write_records(output: str) -> dict[str, Any]:
    from voco import storage, work

    for unit in range(EARLIER_RECORDS):
        storage.write_json(work.record_uri(output, unit), {"unit": unit, **RECORD})
    return {}


def resume(output: str) -> dict[str, Any]:
    """Seconds to know what is pending, and to read every record; the peak memory in MiB that this adds."""
    from voco.run.unit_records import FinishedUnits, UnitRecords
    from voco.store import storage

    storage.list_names(storage.join(output, "work"))
    before = _peak_mib()
    started = time.monotonic()
    pending = FinishedUnits(output, TOTAL).pending
    counted = time.monotonic()
    written = sum(record["written"] for record in UnitRecords(output))
    ended = time.monotonic()
    facts = {"count_s": counted - started, "records_s": ended - counted, "mib": _peak_mib() - before}
    return {**facts, "pending": len(pending), "written": written}


def earlier_resume(output: str) -> dict[str, Any]:
    from voco import storage, work

    storage.names(storage.join(output, "work"))
    started = time.monotonic()
    pending = work.pending(output, EARLIER_RECORDS)
    counted = time.monotonic()
    written = sum(record["written"] for record in work.records(output))
    facts = {"count_s": counted - started, "records_s": time.monotonic() - counted}
    return {**facts, "pending": len(pending), "written": written}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    name, *values = sys.argv[1:]
    print(json.dumps(globals()[name](*(int(value) if value.isdigit() else value for value in values))))
