"""The evaluations of each benchmark side by side: which are bounds, which are compared, and the paired differences of methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from voco.evaluate.scores import READ_ADAPTIVE, READ_WHOLE
from voco.job.tables import METHODS
from voco.report.differences import FRAME_VARIANTS, Difference, difference_text, differences
from voco.report.outputs import Output, OutputGraph
from voco.report.table import MEDIA, SUMS, has_other_official, official_span, official_text, official_title, shared_view
from voco.store import schemas
from voco.store.schemas import ALL

HEADLINE_ROWS = 2  # further VoCo rows that the headline mentions
ROLES = ("upper", "compared", "lower")
READINGS = {READ_WHOLE: "VoCo, uncompressed", READ_ADAPTIVE: "VoCo, adaptive"}  # labels of ways to read a VoCo checkpoint

# The comparison as a table: rows of `schemas.SCORES` with the stage that they come from and their role in the comparison.
SUMMARY = pa.schema(
    [
        ("stage", pa.string()),
        ("output", pa.string()),
        ("role", pa.string()),  # upper, compared or lower
        ("label", pa.string()),
        ("view", pa.string()),  # what one cache holds: an image or a frame
        *schemas.SCORES,
    ]
)


@dataclass(frozen=True)
class Comparison:
    """One benchmark: its rows of category "all" (upper bound first, lower bound last) and its rows by category."""

    benchmark: str
    rows: list[dict[str, Any]]
    categories: list[str]
    by_category: list[dict[str, Any]]
    differences: list[Difference]
    unpaired: list[str]  # why a difference is missing

    @property
    def view(self) -> str:
        """image, frame, or view where both are compared."""
        return shared_view(self.rows)

    @property
    def media(self) -> str:
        """images, videos or samples: what the questions are about."""
        return MEDIA[self.view]

    @property
    def bounded(self) -> bool:
        """True when any row has a retention."""
        return any(row["retention"] is not None for row in [*self.rows, *self.by_category])

    @property
    def official(self) -> str:
        """The title of the column of the published figure; empty where that is the score."""
        return official_title(self.rows) if has_other_official(self.rows) else ""

    def bound(self, role: str, category: str = ALL) -> float | None:
        """The score of a bound: from its own evaluation, else the value that all compared rows agree on."""
        rows = self.rows if category == ALL else [row for row in self.by_category if row["category"] == category]
        own = {row["score"] for row in rows if row["role"] == role}
        values = own or {row[f"{role}_bound"] for row in rows if row[f"{role}_bound"] is not None}
        return float(next(iter(values))) if len(values) == 1 else None


def compare(graph: OutputGraph) -> list[Comparison]:
    """One comparison per benchmark, in the order of the evaluations."""
    evaluations = graph.of_kind("evaluate")
    roles = _roles(evaluations)
    by_benchmark: dict[str, list[tuple[Output, dict[str, Any]]]] = {}
    for output in evaluations:
        table = output.read("scores")
        for row in table.to_pylist() if table is not None else []:
            if row["score"] is None:  # of questions whose answers are not published
                continue
            role = roles[output.uri]
            facts = {"stage": output.name, "output": output.uri, "role": role, "label": row_label(row, role)}
            summary = {**facts, "view": _view(output, row), **row}
            by_benchmark.setdefault(row["benchmark"], []).append((output, summary))
    return [_compare_benchmark(benchmark, rows) for benchmark, rows in by_benchmark.items()]


def _roles(evaluations: list[Output]) -> dict[str, str]:
    """Roles by URI. A bound is what another evaluation names as one; `read_as: voco` also makes an evaluation a lower bound."""
    uppers = {output.input("upper") for output in evaluations}
    lowers = {output.input("lower") for output in evaluations}
    roles = {}
    for output in evaluations:
        low = output.uri in lowers or output.job.get("evaluate", {}).get("read_as") == "voco"
        roles[output.uri] = "upper" if output.uri in uppers else "lower" if low else "compared"
    return roles


def _view(output: Output, row: dict[str, Any]) -> str:
    return "frame" if output.input("frame_cache") is not None or row["method"] in FRAME_VARIANTS else "image"


def method_label(method: str) -> str:
    """The name of a method or a way to read in tables and plots; an unknown one is shown as it is stored."""
    return METHODS[method].label if method in METHODS else (READINGS | FRAME_VARIANTS).get(method, method)


def row_label(row: dict[str, Any], role: str) -> str:
    """The name of a row in tables and plots."""
    if role != "compared":
        return f"{role} bound"
    name = method_label(str(row["method"]))
    if row["method"] in FRAME_VARIANTS:
        return name
    if row["method"] == READ_ADAPTIVE:
        return f"{name}, {row['mean_tokens'] or 0:.2f} tokens"
    is_whole = row["method"] in ("none", READ_WHOLE)
    return f"{name}, {_checkpoint_name(row['checkpoint'])}" if is_whole else f"{name}, N={row['n']}"


def _checkpoint_name(uri: str) -> str:
    """The directory's name; for the `train` directory of a sweep's trial, the trial's name."""
    path = uri.rstrip("/").split("/")
    return path[-2] if path[-1] == "train" and path[-3:-2] == ["runs"] else path[-1]


def _compare_benchmark(benchmark: str, rows: list[tuple[Output, dict[str, Any]]]) -> Comparison:
    _make_labels_unique([row for _, row in rows])
    ordered = sorted(rows, key=lambda item: (ROLES.index(item[1]["role"]), -item[1]["score"]))
    overall = [(output, row) for output, row in ordered if row["category"] == ALL]
    uris = [row["output"] for _, row in overall]
    by_category = sorted((row for _, row in ordered if row["category"] != ALL), key=lambda row: uris.index(row["output"]))
    categories = sorted({row["category"] for row in by_category})
    paired, unpaired = differences(overall)
    return Comparison(benchmark, [row for _, row in overall], categories, by_category, paired, unpaired)


def _make_labels_unique(rows: list[dict[str, Any]]) -> None:
    """Add N to frame variants read at several N; then the stage's name, and then a number, to labels that outputs share."""
    counts: dict[str, set[int]] = {}
    for row in rows:
        counts.setdefault(row["label"], set()).add(row["n"])
    for row in rows:
        row["label"] += f", N={row['n']}" if len(counts[row["label"]]) > 1 and row["method"] in FRAME_VARIANTS else ""
    for key in ("stage", "output"):
        outputs: dict[str, list[str]] = {}
        for row in rows:
            uris = outputs.setdefault(row["label"], [])
            if row["output"] not in uris:
                uris.append(row["output"])
        for row in rows:
            uris = outputs[row["label"]]
            if len(uris) > 1:
                row["label"] += f" ({row['stage']})" if key == "stage" else f" #{uris.index(row['output']) + 1}"


def headline(comparison: Comparison) -> str:
    """The key result in a few sentences: of the best VoCo row, beside the best row of each other method."""
    voco_rows = [row for row in comparison.rows if row["role"] == "compared" and row["method"] == "voco"]
    if not voco_rows:
        return f"{comparison.benchmark}: no VoCo checkpoint was evaluated."
    best, *others = voco_rows
    text = f"{comparison.benchmark}: {best['label']} answers {100 * best['score']:.1f} % of {best['questions']:,} questions right"
    if comparison.official:
        text += f"; the published figure, {(best['official_name'] or 'of another rule').replace('_', ' ')}, is {_official(best)}"
        text += f" (95 % interval {official_span(best)})" if official_span(best) else ""
    if best["retention"] is not None:
        text += (
            f". The uncompressed model reaches {_official(best, 'official_upper_bound')}, the lower bound "
            f"{_official(best, 'official_lower_bound')}; VoCo keeps {100 * best['retention']:.1f} % of the gap between them"
            f"{_interval(best, 'retention')}."
        )
    elif comparison.view == "frame":
        text += " with the frames in order."
    else:
        text += ". Retention is unknown, because a bound is missing."
    firsts: dict[str, str] = {}  # the best row of each method; a method may have many
    for row in comparison.rows:
        firsts.setdefault(str(row["method"]), row["label"])
    named = {*firsts.values(), *(row["label"] for row in others[:1])}
    for difference in comparison.differences:
        if difference.label == best["label"] and difference.category == ALL and difference.other in named:
            subject = "Its score is" if comparison.official else "It is"
            text += f" {subject}{difference_text(difference).removeprefix('It is')}"
    for row in others[:HEADLINE_ROWS]:
        if row["retention"] is not None:
            text += f" {row['label']} keeps {100 * row['retention']:.1f} %{_interval(row, 'retention')}."
    measured = [row for row in voco_rows if row["cache_bytes"] and row["full_cache_bytes"]][: 1 + HEADLINE_ROWS]
    smaller = " and ".join(f"{row['full_cache_bytes'] / row['cache_bytes']:,.0f} times ({row['label']})" for row in measured)
    return f"{text} The cache of {ARTICLE[comparison.view]} is {smaller} smaller than the full cache." if smaller else text


def _official(row: dict[str, Any], column: str = "official") -> str:
    """A published figure with its unit."""
    unit = "" if row[column] is None or row["official_name"] in SUMS else " %"
    return official_text(row, column) + unit


ARTICLE = {"image": "an image", "frame": "a frame", "view": "a view"}


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None or high is None else f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"
