"""Count, sum, minimum and maximum of named figures: small enough for a unit's record, and exact when units are merged."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

Figures = dict[str, dict[str, float]]


def add_values(figures: Figures, name: str, values: pa.Array) -> None:
    """Add every value that is not null. A name whose values are all null does not appear."""
    count = len(values) - values.null_count
    if count:
        ends = pc.min_max(values)
        new = {"count": count, "sum": pc.sum(values).as_py(), "min": ends["min"].as_py(), "max": ends["max"].as_py()}
        merge_figures(figures, {name: new})


def merge_figures(figures: Figures, other: Figures) -> None:
    """Add `other` to `figures`."""
    for name, new in other.items():
        old = figures.get(name)
        if old is None:
            figures[name] = dict(new)
            continue
        old["count"] += new["count"]
        old["sum"] += new["sum"]
        old["min"] = min(old["min"], new["min"])
        old["max"] = max(old["max"], new["max"])


def add_means(figures: Figures) -> Figures:
    """The figures by name, each with its mean."""
    return {name: {**figure, "mean": figure["sum"] / figure["count"]} for name, figure in sorted(figures.items())}
