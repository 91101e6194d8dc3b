"""Numbers as a person reads them, and the comparison as a text table."""

from __future__ import annotations

from typing import Any

MISSING = "missing"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def _figure(row: dict[str, Any], name: str) -> str:
    """A bound has no retention of its own, and what was evaluated without bounds has none: that is not missing."""
    unasked = name != "score" and (row.get("role") in ("upper", "lower") or row["upper_bound"] is None)
    return "-" if row[name] is None and unasked else percent(row[name])


def interval_text(low: float | None, high: float | None) -> str:
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


def text_tables(rows: list[dict[str, Any]]) -> str:
    """One table for each benchmark, in the order of the rows (`comparison.SUMMARY` columns), under a line that names it."""
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    parts = []
    for benchmark in benchmarks:
        held = [row for row in rows if row["benchmark"] == benchmark]
        first = held[0]
        head = f"{benchmark}: {first['questions']:,} questions about {first['samples']:,} {MEDIA[shared_view(held)]}"
        parts.append(f"{head}\n{text_table(held)}")
    return "\n\n".join(parts) or "no scores"


MEDIA = {"image": "images", "frame": "videos", "view": "samples"}


def shared_view(rows: list[dict[str, Any]]) -> str:
    """What the caches of these rows are of: image, frame, or view where that differs or is not known."""
    views = {row.get("view", "view") for row in rows}
    return str(views.pop()) if len(views) == 1 else "view"


def text_table(rows: list[dict[str, Any]]) -> str:
    """The comparison rows (`comparison.SUMMARY` columns, or plain rows of scores) as lines of fixed width.

    Scores, retention and share of the upper bound are in percent with their 95 % intervals; a figure that nobody
    measured is written as missing. Without bounds there is no column of retention.
    """
    if not rows:
        return "no scores"
    wide = len({row["benchmark"] for row in rows}) > 1
    by_category = {row["category"] for row in rows} != {"all"}
    names = ["score", *(["retention", "share_of_upper"] if any(row["retention"] is not None for row in rows) else [])]
    titles = {"score": "score %", "retention": "retention %", "share_of_upper": "of upper %"}
    head = ["benchmark"] * wide + ["category"] * by_category + ["method"]
    head += [title for name in names for title in (titles[name], "95 %")]
    lines = [[*head, f"cache/{shared_view(rows)}", "s/question"]]
    for row in rows:
        figures = [
            text for name in names for text in (_figure(row, name), interval_text(row[f"{name}_low"], row[f"{name}_high"]))
        ]
        name = row.get("label") or f"{row['method']} N={row['n']}"
        measures = [bytes_text(row["cache_bytes"]), seconds_text(row["latency_s"])]
        lines.append([row["benchmark"]] * wide + [row["category"]] * by_category + [name, *figures, *measures])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    words = wide + by_category + 1  # columns of words are left-aligned, figures right-aligned
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
