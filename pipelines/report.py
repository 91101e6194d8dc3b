"""Reads outputs of any kind, writes `report.html`, `summary/`, `summary.json` and the manifest; prints the comparison."""

from __future__ import annotations

import time

import pyarrow as pa

from voco.evaluate.scores import ALL
from voco.job.spec import Job
from voco.report import html, table
from voco.report.comparison import SUMMARY, compare
from voco.report.differences import difference_text
from voco.report.outputs import gather_outputs
from voco.run import manifest
from voco.run.manifest import Manifest
from voco.store import parquet, storage


def run(job: Job, run_id: str) -> Manifest:
    """One report job. Raises Refused when none of its inputs is a finished output."""
    started = time.time()
    block = job.report
    assert block is not None
    output = storage.resolve(job.output)
    world = gather_outputs(job.inputs.outputs)
    comparisons = compare(world)
    compared = [row for comparison in comparisons for row in comparison.rows]
    summary = compared + [row for comparison in comparisons for row in comparison.by_category]
    place = storage.join(output, "report.html")
    storage.write_bytes(place, html.render_page(world, block.title).encode())
    entry = parquet.write_table(storage.join(output, "summary", "part-00000.parquet"), [_table(summary)], SUMMARY)
    storage.write_json(storage.join(output, "summary.json"), summary)
    print(table.text_tables(compared), flush=True)
    for difference in (one for comparison in comparisons for one in comparison.differences if one.category == ALL):
        print(difference_text(difference, whole=True), flush=True)
    print(f"{job.name}: {place}", flush=True)
    counts = {"read": len(world.outputs), "missing": len(world.missing), "written": 1}
    return manifest.write_manifest(
        job, run_id, started, counts=counts, tables={"summary": [entry]}, statistics={"report": "report.html"}
    )


def _table(summary: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(summary, schema=SUMMARY)
