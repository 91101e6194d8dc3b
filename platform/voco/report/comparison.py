"""What the evaluations say together: who is a bound, who is compared, and the paired difference of two methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from voco.evaluate.scores import ALL
from voco.report.differences import VARIANTS, Difference, difference_text, differences
from voco.report.outputs import Output, OutputGraph
from voco.report.table import MEDIA, shared_view
from voco.store import schemas

ROLES = ("upper", "compared", "lower")
METHODS = {
    "voco": "VoCo", "none": "uncompressed", "avg_pool": "average pooling", "q_former": "Q-Former", "fastv": "FastV",
    "shuffled_frames": "frames shuffled", "one_frame": "one frame only",
}  # fmt: skip

# The comparison as a table: a row of scores with the stage that it came from and its part in the comparison.
SUMMARY = pa.schema(
    [
        ("stage", pa.string()),
        ("output", pa.string()),
        ("role", pa.string()),  # upper, compared or lower
        ("label", pa.string()),
        ("view", pa.string()),  # what one cache is of: image or frame
        *schemas.SCORES,
    ]
)


@dataclass(frozen=True)
class Comparison:
    """One benchmark: its rows of category "all" (upper bound first, lower bound last), its rows by category."""

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
        """True when any row says how much it keeps."""
        return any(row["retention"] is not None for row in [*self.rows, *self.by_category])

    def bound(self, role: str, category: str = ALL) -> float | None:
        """The score of a bound: its own evaluation's, else what every compared row says alike."""
        held = self.rows if category == ALL else [row for row in self.by_category if row["category"] == category]
        own = {row["score"] for row in held if row["role"] == role}
        said = {row[f"{role}_bound"] for row in held if row[f"{role}_bound"] is not None}
        values = own or said
        return float(next(iter(values))) if len(values) == 1 else None


def compare(world: OutputGraph) -> list[Comparison]:
    """One comparison a benchmark, in the order in which they were evaluated."""
    evaluations = world.of_kind("evaluate")
    roles = _roles(evaluations)
    found: dict[str, list[tuple[Output, dict[str, Any]]]] = {}
    for output in evaluations:
        table = output.read("scores")
        for row in table.to_pylist() if table is not None else []:
            role = roles[output.uri]
            facts = {"stage": output.name, "output": output.uri, "role": role, "label": label(row, role)}
            whole = {**facts, "view": _view(output, row), **row}
            found.setdefault(row["benchmark"], []).append((output, whole))
    return [_one(benchmark, held) for benchmark, held in found.items()]


def _roles(evaluations: list[Output]) -> dict[str, str]:
    """A bound is what another evaluation names as one; read under the VoCo mask untrained, it is the lower bound."""
    uppers = {output.input("upper") for output in evaluations}
    lowers = {output.input("lower") for output in evaluations}
    roles = {}
    for output in evaluations:
        low = output.uri in lowers or output.job.get("evaluate", {}).get("read_as") == "voco"
        roles[output.uri] = "upper" if output.uri in uppers else "lower" if low else "compared"
    return roles


def _view(output: Output, row: dict[str, Any]) -> str:
    return "frame" if output.input("frame_cache") is not None or row["method"] in VARIANTS else "image"


def label(row: dict[str, Any], role: str) -> str:
    """How a row is called in tables and plots."""
    if role == "upper":
        return "upper bound"
    if role == "lower":
        return "lower bound"
    name = METHODS.get(row["method"], str(row["method"]))
    if row["method"] in VARIANTS:
        return name
    return f"{name}, {_checkpoint(row['checkpoint'])}" if row["method"] == "none" else f"{name}, N={row['n']}"


def _checkpoint(uri: str) -> str:
    """What a checkpoint is called: its directory, or the trial's where it is a trial's `train`."""
    path = uri.rstrip("/").split("/")
    return path[-2] if path[-1] == "train" and path[-3:-2] == ["runs"] else path[-1]


def _one(benchmark: str, held: list[tuple[Output, dict[str, Any]]]) -> Comparison:
    _tell_apart([row for _, row in held])
    order = sorted(held, key=lambda item: (ROLES.index(item[1]["role"]), -item[1]["score"]))
    whole = [(output, row) for output, row in order if row["category"] == ALL]
    places = [row["output"] for _, row in whole]
    by_category = sorted((row for _, row in order if row["category"] != ALL), key=lambda row: places.index(row["output"]))
    categories = sorted({row["category"] for row in by_category})
    found, unpaired = differences(whole)
    return Comparison(benchmark, [row for _, row in whole], categories, by_category, found, unpaired)


def _tell_apart(held: list[dict[str, Any]]) -> None:
    """Labels that several N share get theirs; that several outputs share the stage's name, and their number if that is shared."""
    counts: dict[str, set[int]] = {}
    for row in held:
        counts.setdefault(row["label"], set()).add(row["n"])
    for row in held:
        row["label"] += f", N={row['n']}" if len(counts[row["label"]]) > 1 and row["method"] in VARIANTS else ""
    for name in ("stage", "output"):
        outputs: dict[str, list[str]] = {}
        for row in held:
            places = outputs.setdefault(row["label"], [])
            if row["output"] not in places:
                places.append(row["output"])
        for row in held:
            places = outputs[row["label"]]
            if len(places) > 1:
                row["label"] += f" ({row['stage']})" if name == "stage" else f" #{places.index(row['output']) + 1}"


def headline(comparison: Comparison) -> str:
    """The key result in words; only what the figures carry."""
    ours = [row for row in comparison.rows if row["role"] == "compared" and row["method"] == "voco"]
    if not ours:
        return f"{comparison.benchmark}: no VoCo checkpoint was evaluated."
    best, *others = ours
    text = f"{comparison.benchmark}: {best['label']} answers {100 * best['score']:.1f} % of {best['questions']:,} questions right"
    if best["retention"] is not None:
        text += (
            f", against {100 * best['upper_bound']:.1f} % uncompressed and {100 * best['lower_bound']:.1f} % at the lower bound: "
            f"it keeps {100 * best['retention']:.1f} % of what lies between them{_interval(best, 'retention')}."
        )
    elif comparison.view == "frame":
        text += " with a video's frames in order."
    else:
        text += "; without both bounds nothing can be said of what it keeps."
    for difference in comparison.differences:
        if difference.label == best["label"] and difference.category == ALL:
            text += " " + difference_text(difference)
    for row in others:
        if row["retention"] is not None:
            text += f" {row['label']} keeps {100 * row['retention']:.1f} %{_interval(row, 'retention')}."
    measured = [row for row in ours if row["cache_bytes"] and row["full_cache_bytes"]]
    smaller = " and ".join(f"{row['full_cache_bytes'] / row['cache_bytes']:,.0f} times ({row['label']})" for row in measured)
    return f"{text} The cache of {ARTICLE[comparison.view]} is {smaller} smaller than the full one." if smaller else text


ARTICLE = {"image": "an image", "frame": "a frame", "view": "a view"}


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None or high is None else f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"
