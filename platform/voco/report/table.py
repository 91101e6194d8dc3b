"""Numbers with units for people to read, and the comparison as text tables."""

from __future__ import annotations

from typing import Any

MISSING = "missing"


def percent(value: float | None) -> str:
    """A share in percent, without the sign."""
    return MISSING if value is None else f"{100 * value:.1f}"


def _figure(row: dict[str, Any], name: str) -> str:
    """A score or retention in percent. A bound, or a row without bounds, has no retention: a dash, not MISSING."""
    not_applicable = name != "score" and (row.get("role") in ("upper", "lower") or row["upper_bound"] is None)
    return "-" if row[name] is None and not_applicable else percent(row[name])


# Published figures that are sums of percentages; the others are shares of 1
SUMS = {"perception", "cognition"}


def has_other_official(rows: list[dict[str, Any]]) -> bool:
    """True when the published figure is not the score: it differs, or the set of a scored row is not complete."""
    return any(row["score"] is not None and row["official"] != row["score"] for row in rows)


def official_title(rows: list[dict[str, Any]]) -> str:
    """The published figure's name and unit, as a column's title; `official` where the rows have several."""
    names = sorted({row["official_name"] for row in rows if row["official_name"] is not None})
    return "official" if len(names) != 1 else names[0].replace("_", " ") + ("" if names[0] in SUMS else " %")


def official_text(row: dict[str, Any], column: str = "official") -> str:
    """A published figure, or a bound of it: a share in percent, a sum as it is."""
    value = row[column]
    return f"{value:,.1f}" if value is not None and row["official_name"] in SUMS else percent(value)


def official_span(row: dict[str, Any]) -> str:
    """The published figure's interval in the same unit; empty when there is none."""
    low, high = row["official_low"], row["official_high"]
    if low is None or high is None or row["official_name"] not in SUMS:
        return interval_text(low, high)
    return f"{low:,.1f} to {high:,.1f}"


def interval_text(low: float | None, high: float | None) -> str:
    """An interval in percent; empty when there is none."""
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def bytes_text(value: float | None) -> str:
    """A number of bytes with a binary unit."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def seconds_text(value: float | None) -> str:
    """A duration, from microseconds to hours."""
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
    """A number of operations with a decimal unit."""
    if value is None:
        return MISSING
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000 or unit == "E":
            break
        value /= 1000
    return f"{value:.3g} {unit}FLOP"


def text_tables(rows: list[dict[str, Any]]) -> str:
    """A heading and a table per benchmark, in the order of the rows (columns of `comparison.SUMMARY`)."""
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    parts = []
    for benchmark in benchmarks:
        own_rows = [row for row in rows if row["benchmark"] == benchmark]
        first = own_rows[0]
        head = f"{benchmark}: {first['questions']:,} questions about {first['samples']:,} {MEDIA[shared_view(own_rows)]}"
        parts.append(f"{head}\n{text_table(own_rows)}")
    return "\n\n".join(parts) or "no scores"


def _figure_and_interval(row: dict[str, Any], name: str) -> tuple[str, str]:
    if name == "official":
        return official_text(row), official_span(row)
    return _figure(row, name), interval_text(row[f"{name}_low"], row[f"{name}_high"])


MEDIA = {"image": "images", "frame": "videos", "view": "samples"}


def shared_view(rows: list[dict[str, Any]]) -> str:
    """What one cache of these rows holds: an image, a frame, or a view when the rows differ or do not say."""
    views = {row.get("view", "view") for row in rows}
    return str(views.pop()) if len(views) == 1 else "view"


def text_table(rows: list[dict[str, Any]]) -> str:
    """Rows with the columns of `comparison.SUMMARY` or `schemas.SCORES` as lines of fixed width.

    Score, retention and share of the upper bound are in percent with their 95 % intervals; a figure that was not measured
    is shown as missing. Without bounds there is no column of retention, and none of the published figure where it is the score.
    """
    if not rows:
        return "no scores"
    from voco.store.schemas import ALL  # with pyarrow, which `voco plan` does not need for its figures

    with_benchmark = len({row["benchmark"] for row in rows}) > 1
    with_category = {row["category"] for row in rows} != {ALL}
    names = ["score", *(["official"] if has_other_official(rows) else [])]
    names += ["retention", "share_of_upper"] if any(row["retention"] is not None for row in rows) else []
    titles = {"score": "score %", "official": official_title(rows), "retention": "retention %", "share_of_upper": "of upper %"}
    head = ["benchmark"] * with_benchmark + ["category"] * with_category + ["method"]
    head += [title for name in names for title in (titles[name], "95 %")]
    lines = [[*head, f"cache/{shared_view(rows)}", "s/question"]]
    for row in rows:
        figures = [text for name in names for text in _figure_and_interval(row, name)]
        name = row.get("label") or f"{row['method']} N={row['n']}"
        measures = [bytes_text(row["cache_bytes"]), seconds_text(row["latency_s"])]
        lines.append([row["benchmark"]] * with_benchmark + [row["category"]] * with_category + [name, *figures, *measures])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text_columns = with_benchmark + with_category + 1  # left-aligned; numbers are right-aligned
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
