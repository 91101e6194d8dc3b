"""What a report job writes: the page, and the comparison as a table, as JSON and as text."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from voco.report import html, table
from voco.report.comparison import SUMMARY, compare
from voco.report.differences import difference_text
from voco.report.outputs import gather_outputs
from voco.run import units
from voco.store import parquet, storage
from voco.store.schemas import ALL

PAGE, SUMMARY_FILE, SUMMARY_TEXT = "report.html", "summary.json", "summary.txt"


def write_report_job(outputs: list[str], to: str, title: str) -> tuple[dict[str, Any], list[str]]:
    """Write `report.html`, `summary/`, `summary.json` and `summary.txt` to the directory `to`.

    Returns counts and tables of the job's manifest, and the comparison as lines of text. Raises Refused when none of the
    outputs is finished.
    """
    graph = gather_outputs(outputs)
    comparisons = compare(graph)
    compared = [row for comparison in comparisons for row in comparison.rows]
    summary = compared + [row for comparison in comparisons for row in comparison.by_category]
    storage.write_bytes(storage.join(to, PAGE), html.render_page(graph, title).encode())
    rows = pa.Table.from_pylist(summary, schema=SUMMARY)
    entry = parquet.write_table(units.part_uri(to, "summary", 0), [rows], SUMMARY)
    storage.write_json(storage.join(to, SUMMARY_FILE), summary)
    differences = [difference for comparison in comparisons for difference in comparison.differences]
    lines = [difference_text(difference, standalone=True) for difference in differences if difference.category == ALL]
    text = [table.text_tables(compared), *lines]
    storage.write_bytes(storage.join(to, SUMMARY_TEXT), "\n\n".join([text[0], "\n".join(lines)]).encode())
    counts = {"read": len(graph.outputs), "missing": len(graph.missing), "written": 1}
    return {"counts": counts, "tables": {"summary": [entry]}}, text
