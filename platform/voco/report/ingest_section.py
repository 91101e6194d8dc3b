"""Data section: rows that each ingest job read, wrote and rejected, its statistics, and a few samples with their pictures."""

from __future__ import annotations

from typing import Any

from voco.report.outputs import Output
from voco.report.pictures import first_rows, picture

SAMPLES_SHOWN = 3  # per ingest output


def ingest_section(output: Output) -> dict[str, Any]:
    """The template's values for one ingest output."""
    shown: list[dict[str, Any]] = [{"row": row, "picture": picture(row)} for row in first_rows(output, SAMPLES_SHOWN)]
    counts = output.manifest.counts
    rejected = counts.get("rejected") or {}
    figures, facts = _statistics(output.manifest.statistics)
    block = output.job.get("ingest", {})
    files = output.manifest.tables.get("samples")
    return {
        "output": output, "counts": counts, "rejected": rejected, "rejected_rows": sum(rejected.values()),
        "figures": figures, "facts": facts, "shown": shown, "videos": any(sample["picture"].wide for sample in shown),
        "format": block.get("format"), "dataset": block.get("dataset"), "split": block.get("split"),
        "bytes": sum(entry["bytes"] for entry in files) if files else None,
    }  # fmt: skip


def _statistics(statistics: dict[str, Any]) -> tuple[list[tuple[str, list[str], dict[str, Any]]], list[tuple[str, Any]]]:
    """Nested statistics whose entries have equal columns as tables (name, columns, entries), all others as (name, value)."""
    tables: list[tuple[str, list[str], dict[str, Any]]] = []
    facts: list[tuple[str, Any]] = []
    for name, value in statistics.items():
        entries = list(value.values()) if isinstance(value, dict) else []
        if entries and all(isinstance(entry, dict) and entry and entry.keys() == entries[0].keys() for entry in entries):
            tables.append((name, sorted(entries[0], key=_column_order), value))
        elif isinstance(value, dict):
            inner_tables, inner_facts = _statistics(value)
            tables += [(f"{name}: {key}", columns, rows) for key, columns, rows in inner_tables]
            facts += [(f"{name}: {key}", fact) for key, fact in inner_facts]
        else:
            facts.append((name, value))
    return tables, facts


def _column_order(name: str) -> tuple[int, str]:
    order = ("count", "min", "mean", "max", "sum")
    return (order.index(name) if name in order else len(order), name)
