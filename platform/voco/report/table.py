"""Numbers as a person reads them, and the comparison as a text table."""

from __future__ import annotations

from typing import Any

MISSING = "missing"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def _figure(row: dict[str, Any], name: str) -> str:
    """A bound has no retention of its own, so that one is not missing."""
    return "-" if row[name] is None and row.get("role") in ("upper", "lower") else percent(row[name])


def span(low: float | None, high: float | None) -> str:
    """An interval in percent; empty when there is none."""
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def bytes_text(value: float | None) -> str:
    """Bytes with a binary unit."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def seconds_text(value: float | None) -> str:
    """A duration: microseconds to hours."""
    if value is None:
        return MISSING
    if value == 0:
        return "0 s"
    if value < 1e-3:
        return f"{1e6 * value:.0f} µs"
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {int(value % 60)} s" if value < 7200 else f"{value / 3600:.1f} h"


def flops_text(value: float | None) -> str:
    if value is None:
        return MISSING
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000 or unit == "P":
            break
        value /= 1000
    return f"{value:.3g} {unit}FLOP"


def text_table(rows: list[dict[str, Any]]) -> str:
    """The comparison rows (`comparison.SUMMARY` columns, or plain rows of scores) as lines of fixed width.

    Scores, retention and share of the upper bound are in percent with their 95 % intervals; a figure that nobody
    measured is written as missing.
    """
    if not rows:
        return "no scores"
    wide = len({row["benchmark"] for row in rows}) > 1
    by_category = {row["category"] for row in rows} != {"all"}
    head = ["benchmark"] * wide + ["category"] * by_category
    head += ["method", "score %", "95 %", "retention %", "95 %", "of upper %", "95 %", "cache/image", "s/question"]
    lines = [head]
    for row in rows:
        figures = [
            text
            for name in ("score", "retention", "share_of_upper")
            for text in (_figure(row, name), span(row[f"{name}_low"], row[f"{name}_high"]))
        ]
        name = row.get("label") or f"{row['method']} N={row['n']}"
        measures = [bytes_text(row["cache_bytes"]), seconds_text(row["latency_s"])]
        lines.append([row["benchmark"]] * wide + [row["category"]] * by_category + [name, *figures, *measures])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    words = wide + by_category + 1  # columns of words are left-aligned, figures right-aligned
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
