"""Peak memory of the driver at a quarter and at all of the rows, for every stage that lists rows.

python bench/driver_memory.py [--share 0.3]

The sources have the mission's numbers of rows (times `--share`): CC3M's TSV, WebVid's CSV, and a finished `samples/` of CC3M's
size with media of a few bytes. Each measurement is a fresh process that does the driver's part of the stage: it writes the work
list, takes a record for each unit, reads the records back, adds them up and writes the manifest. The work of units, which needs
the media and runs on workers, is left out: records are synthetic, in the real form. The figure of a stage is the peak of the
process at all rows over that at a quarter. Two processes run at a time, the longest first: the peak of one does not depend on
the others. All rows (`--share 1`) take about twenty minutes of processor time, most of it the parsing of 5.8 million rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
from side_by_side import call, write
from units_run import RECORD

ROWS = {"cc3m": 3_318_333, "webvid": 2_500_000, "features": 3_318_333, "frame_cache": 3_318_333, "evaluate": 3_318_333}
SLOWEST = ["cc3m", "webvid", "frame_cache", "features", "evaluate"]
PROCESSES = 2  # at a time
GROUP_ROWS, PART_ROWS = 500, 20_000  # of the generated `samples/`
CONVERSATION = {
    "source_id": "q",
    "turns": [{"role": "user", "text": "What is it?"}, {"role": "assistant", "text": "A red kite over the beach."}],
    "placeholder": "before", "answers": [], "choices": [], "category": None, "extra": None,
}  # fmt: skip


def source_of(stage: str) -> str:
    """What a stage reads: its own list, or the samples that the other stages read too."""
    return stage if stage in ("cc3m", "webvid") else "samples"


def write_source(name: str, rows: int, path: str) -> dict[str, Any]:
    """CC3M's TSV or WebVid's CSV with distinct captions and names."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if name == "cc3m" else ",", lineterminator="\n")
        if name == "webvid":
            writer.writerow(["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"])
        for row in range(rows):
            caption = f"boat number {row} leaving a small harbour at dawn while the fog lifts"
            if name == "cc3m":
                writer.writerow([caption, f"http://example.org/pictures/{row % 997}/{row:09d}.jpg"])
            else:
                writer.writerow([row, caption, row % 999, f"{row % 999:06d}", "PT00H00M14S", f"https://host/{row}/x.mp4"])
    return {}


def write_samples(_name: str, rows: int, output: str) -> dict[str, Any]:
    """A finished `samples/` of images that have a few bytes each."""
    from voco.store import index, parquet, schemas, storage

    conversations = pa.array([[CONVERSATION]] * GROUP_ROWS, schemas.SAMPLES.field("conversations").type)
    medium = {"path": "a.jpg", "format": "jpeg", "width": 640, "height": 480, "duration_s": None, "fps": None, "num_frames": None}
    facts: list[dict[str, Any]] = []

    def group(first: int, count: int) -> pa.Table:
        names = [f"{(row * 0x9E3779B97F4A7C15) % (1 << 64):032x}" for row in range(first, first + count)]
        media = [[{**medium, "bytes": b"0", "sha256": name * 2}] for name in names]
        columns = [pa.array(names), *(pa.array([text] * count) for text in ("cc3m", "train", "image"))]
        columns += [pa.array(media, schemas.SAMPLES.field("media").type), conversations.slice(0, count)]
        return pa.Table.from_arrays(columns, schema=schemas.SAMPLES)

    def groups(first: int, stop: int) -> Iterator[pa.Table]:
        for start in range(first, stop, GROUP_ROWS):
            table = group(start, min(GROUP_ROWS, stop - start))
            if not facts or table.num_rows != GROUP_ROWS:
                facts.append(index.group_facts(table))
            else:
                facts.append({**facts[0], "first_id": table["sample_id"][0].as_py()})
            yield table

    parts = [
        parquet.write_table(
            storage.join(output, "samples", f"part-{number:05d}.parquet"),
            groups(first, min(rows, first + PART_ROWS)),
            schemas.SAMPLES,
        )
        for number, first in enumerate(range(0, rows, PART_ROWS))
    ]
    index.write_table_index(output, [index.samples_rows(facts, parts)], schemas.SAMPLES_INDEX)
    return {}


def drive(name: str, rows: int, source: str, output: str) -> dict[str, Any]:
    """The driver's part of a stage. Returns its peak memory in MiB, its seconds and its units."""
    started = time.monotonic()
    count, sizes, account = LISTING[name](rows, source, output)
    from voco.run.manifest import Manifest, manifest_uri
    from voco.run.unit_records import FinishedUnits, UnitRecords, write_record
    from voco.store import storage

    done = FinishedUnits(output, count)
    tables = {name: [dict(entry) for entry in entries] for name, entries in RECORD["tables"].items()}
    record = {**RECORD, "tables": tables, "rejected": {}}
    for unit in done.pending:
        for entry in (*tables["samples"], *tables["rejects"]):
            entry["path"] = f"part-{unit:05d}.parquet"
        record["written"] = sizes(unit)
        done.add(unit, write_record(output, unit, record))
    fields = account(UnitRecords(output))
    finished = Manifest(kind=name, name=name, run_id="r", spec_sha256="", **fields)
    storage.write_json(manifest_uri(output), finished.model_dump())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"mib": peak, "seconds": time.monotonic() - started, "units": count, "written": fields["counts"]["written"]}


def _list_source(source_format: str, unit_rows: int, rows: int, source: str, output: str) -> Any:
    from voco.ingest.accounting import add_up
    from voco.ingest.listing import list_samples
    from voco.job.config import Ingest

    block = Ingest(format=source_format, dataset="bench", unit_rows=unit_rows)
    listing = list_samples(block, source, output)
    return listing.units, lambda unit: min(unit_rows, rows - unit * unit_rows), lambda records: add_up(listing, records).fields


def _list_rows(count: int, unit_rows: int, rows: int) -> Any:
    def account(records: Any) -> dict[str, Any]:
        written = sum(record["written"] for record in records)
        return {
            "counts": {"written": written},
            "tables": {"parts": [entry for record in records for entry in record["tables"]["samples"]]},
        }

    return count, lambda unit: min(unit_rows, rows - unit * unit_rows), account


def _features(rows: int, source: str, output: str) -> Any:
    from voco.precompute.features import list_images

    return _list_rows(list_images(output, [source], 2000), 2000, rows)


def _frame_cache(rows: int, source: str, output: str) -> Any:
    from voco.precompute.frame_cache import list_media_samples

    return _list_rows(list_media_samples(output, [source], 50), 50, rows)


def _evaluate(rows: int, source: str, output: str) -> Any:
    from voco.evaluate.answering import list_evaluation_rows
    from voco.job.evaluation import Evaluate

    return _list_rows(list_evaluation_rows(output, [source], Evaluate(benchmark="bench", unit_samples=500)), 500, rows)


LISTING: dict[str, Any] = {
    "cc3m": lambda *paths: _list_source("cc3m_tsv", 2000, *paths),
    "webvid": lambda *paths: _list_source("webvid_csv", 500, *paths),
    "features": _features,
    "frame_cache": _frame_cache,
    "evaluate": _evaluate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.3, help="of the mission's rows")
    parser.add_argument("--stages", nargs="*", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    shares = (options.share / 4, options.share)
    tasks = [(name, int(ROWS[name] * share)) for share in reversed(shares) for name in sorted(options.stages, key=SLOWEST.index)]
    results: dict[str, list[dict[str, Any]]] = {name: [{}, {}] for name in options.stages}
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(PROCESSES) as pool:
        sources = {(source_of(name), rows): Path(directory) / f"{source_of(name)}-{rows}" for name, rows in tasks}
        writing = [
            pool.submit(
                call, "driver_memory.py", "write_samples" if kind == "samples" else "write_source", kind, rows, path, timeout=None
            )
            for (kind, rows), path in sources.items()
        ]
        for written in writing:
            written.result()

        def measure(task: tuple[str, int]) -> tuple[str, dict[str, Any]]:
            name, rows = task
            output = Path(directory) / f"{name}-out-{rows}"
            result = call("driver_memory.py", "drive", name, rows, sources[source_of(name), rows], output, timeout=None)
            shutil.rmtree(output)
            return name, {**result, "rows": rows}

        for name, result in pool.map(measure, tasks):
            assert result["written"] == result["rows"], f"{name}: {result['written']:,} of {result['rows']:,} rows"
            results[name][result["rows"] == int(ROWS[name] * options.share)] = result
            shown = f"{result['rows']:,} rows, {result['units']:,} units: {result['mib']:,.0f} MiB, {result['seconds']:.0f} s"
            print(f"  {name}: {shown}", flush=True)
    figures = {f"{name}_4_4_over_1_4": full["mib"] / quarter["mib"] for name, (quarter, full) in results.items()}
    for name, (quarter, full) in results.items():
        figures[f"{name}_bytes_per_row"] = (full["mib"] - quarter["mib"]) * (1 << 20) / (full["rows"] - quarter["rows"])
    own = {
        f"{name}_{part}_mib": result["mib"]
        for name, pair in results.items()
        for part, result in zip(("1_4", "4_4"), pair, strict=True)
    }
    write(
        "driver-memory",
        f"the driver's part of each stage at {options.share:.0%} of the mission's rows",
        own,
        {},
        {},
        load,
        figures,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("write_source", "write_samples", "drive"):
        function, *values = sys.argv[1:]
        print(json.dumps(globals()[function](*(int(value) if value.isdigit() else value for value in values))))
    else:
        main()
