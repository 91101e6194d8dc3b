"""Sweeps: what each trial keeps against its compression ratio V/N, and a table of the trials."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from voco.evaluate.scores import ALL
from voco.job import trials
from voco.report.comparison import METHODS
from voco.report.outputs import Output
from voco.report.ratio_plot import Point, ratio_plot
from voco.store import storage

LOWER = "lower_bound"  # the method of answers that are the lower bound


def sweep_section(output: Output) -> dict[str, Any]:
    """One sweep: a row of each evaluation of each trial, the plot with its legend, and what the plot leaves out."""
    table = output.read("trials")
    rows = [row for row in (table.to_pylist() if table is not None else []) if row["category"] == ALL]
    values = _values(output)
    trials = []
    for row in rows:
        layout = _layout(output, row["trial"])
        # nothing is compressed under method none, whatever N its checkpoint names
        ratio = None if layout is None else 1.0 if row["method"] in ("none", LOWER) else layout["vision_slots"] / row["n"]
        trials.append({"row": row, "ratio": ratio, "values": values.get(row["trial"], {}), "layout": layout, "part": _part(row)})
    bounded = any(row["retention"] is not None for row in rows)
    measured = "retention" if bounded else "score"
    chosen = [trial for trial in trials if trial["row"]["method"] not in ("none", LOWER) and trial["row"][measured] is not None]
    points = [_point(trial, measured) for trial in chosen if trial["ratio"]]
    left_out = [f"{trial['row']['trial']}: its compression ratio is missing" for trial in chosen if not trial["ratio"]]
    plot = ratio_plot(f"{measured} against compression ratio", f"{measured} %", points, _bounds(rows, bounded)) if points else ""
    return {
        "output": output, "trials": trials, "plot": Markup(plot), "measured": measured, "left_out": left_out,
        "keys": list(dict.fromkeys(key for trial in trials for key in trial["values"])),
        "legend": list(dict.fromkeys(point.series for point in points)),
        "bounds": _bounds(rows, False) if bounded else [],
        "slots": sorted({trial["layout"]["vision_slots"] for trial in trials if trial["layout"]}),
    }  # fmt: skip


def _values(output: Output) -> dict[str, dict[str, Any]]:
    """The values of each trial by dotted key, a block's entries apart; empty when the job as sent is gone."""
    found = {}
    for values in trials.axis_product(output.job.get("sweep", {}).get("axes", {})):
        flat: dict[str, Any] = {}
        for key, value in values.items():
            flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        found[trials.trial_name(values)] = flat
    return found


def _layout(output: Output, trial: str) -> dict[str, Any] | None:
    """The layout of a trial's checkpoint; None when that is gone."""
    place = storage.join(output.uri, "runs", trial, "train", "model", "config.json")
    return dict(storage.read_json(place)["layout"]) if storage.exists(place) else None


def _part(row: dict[str, Any]) -> str:
    return "lower bound" if row["method"] == LOWER else "upper bound" if row["method"] == "none" else ""


def _point(trial: dict[str, Any], measured: str) -> Point:
    row = trial["row"]
    beside = [str(value) for key, value in trial["values"].items() if key.split(".")[0] != "compression"]
    series = ", ".join([METHODS.get(row["method"], row["method"]), *beside])
    low, high = (None if row[f"{measured}_{end}"] is None else 100 * row[f"{measured}_{end}"] for end in ("low", "high"))
    return Point(f"N={row['n']}: {100 * row[measured]:.1f} %", series, trial["ratio"], 100 * row[measured], low, high)


def _bounds(rows: list[dict[str, Any]], as_retention: bool) -> list[tuple[str, float]]:
    """The bounds as lines in percent: 100 and 0 of retention by definition, else the trials' own where all say the same."""
    if as_retention:
        return [("upper bound", 100.0), ("lower bound", 0.0)]
    found = []
    for name in ("upper", "lower"):
        said = {row[f"{name}_bound"] for row in rows if row[f"{name}_bound"] is not None}
        if len(said) == 1:
            found.append((f"{name} bound", 100 * said.pop()))
    return found
