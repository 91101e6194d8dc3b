"""Sweep section: score or retention of each trial against its compression ratio V/N, and a table of the trials."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from voco.evaluate.scores import LOWER_BOUND, READ_WHOLE
from voco.job import trials
from voco.job.tables import METHODS
from voco.model.checkpoint_layout import config_uri
from voco.report.comparison import method_label
from voco.report.outputs import Output
from voco.report.ratio_plot import RatioPoint, ratio_plot
from voco.store import storage
from voco.store.schemas import ALL


def sweep_section(output: Output) -> dict[str, Any]:
    """The template's values for one sweep: a row per evaluation, the plot with its legend, and what the plot leaves out."""
    table = output.read("trials")
    rows = [row for row in (table.to_pylist() if table is not None else []) if row["category"] == ALL]
    values = _values(output)
    trials = []
    for row in rows:
        layout = _layout(output, row["trial"])
        # a checkpoint of method none compresses nothing, whatever its N
        is_whole = row["method"] in ("none", LOWER_BOUND, READ_WHOLE)
        ratio = None if layout is None else 1.0 if is_whole else layout["vision_slots"] / row["n"]
        trials.append(
            {"row": row, "ratio": ratio, "values": values.get(row["trial"], {}), "layout": layout, "bound": _bound(row)}
        )
    bounded = any(row["retention"] is not None for row in rows)
    measured = "retention" if bounded else "score"
    chosen = [trial for trial in trials if not trial["bound"] and trial["row"][measured] is not None]
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
    """The values of each trial by dotted key, with a row for each key of a block; empty when `run.json` is gone."""
    by_trial = {}
    for values in trials.axis_product(output.job.get("sweep", {}).get("axes", {})):
        flat: dict[str, Any] = {}
        for key, value in values.items():
            flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        by_trial[trials.trial_name(values)] = flat
    return by_trial


def _layout(output: Output, trial: str) -> dict[str, Any] | None:
    """The layout of a trial's checkpoint; None when the checkpoint is gone."""
    config = config_uri(storage.join(output.uri, "runs", trial, "train"))
    return dict(storage.read_json(config)["layout"]) if storage.exists(config) else None


def _bound(row: dict[str, Any]) -> str:
    """Which bound a row is; empty for a compared row."""
    return "lower bound" if row["method"] == LOWER_BOUND else "upper bound" if row["method"] == "none" else ""


def _point(trial: dict[str, Any], measured: str) -> RatioPoint:
    row = trial["row"]
    is_whole = row["method"] == READ_WHOLE
    other_values = [str(value) for key, value in trial["values"].items() if key.split(".")[0] != "compression"]
    elastic = ["elastic"] if isinstance(trial["values"].get("compression.tokens"), list) else []
    series = ", ".join([METHODS["voco"].label if is_whole else method_label(row["method"]), *elastic, *other_values])
    low, high = (None if row[f"{measured}_{end}"] is None else 100 * row[f"{measured}_{end}"] for end in ("low", "high"))
    tokens = "uncompressed" if is_whole else f"N={row['n']}"
    return RatioPoint(f"{tokens}: {100 * row[measured]:.1f} %", series, trial["ratio"], 100 * row[measured], low, high)


def _bounds(rows: list[dict[str, Any]], as_retention: bool) -> list[tuple[str, float]]:
    """The bounds in percent: 100 and 0 as retention, by definition; else the scores, where all trials have the same bound."""
    if as_retention:
        return [("upper bound", 100.0), ("lower bound", 0.0)]
    bounds = []
    for name in ("upper", "lower"):
        scores = {row[f"{name}_bound"] for row in rows if row[f"{name}_bound"] is not None}
        if len(scores) == 1:
            bounds.append((f"{name} bound", 100 * scores.pop()))
    return bounds
