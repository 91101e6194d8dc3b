"""What the evaluations say together: who is a bound, who is compared, and the paired difference of two methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from voco import rows
from voco.errors import Refused
from voco.evaluate.retention import bootstrap
from voco.evaluate.scores import ALL, join_correct
from voco.report.outputs import Output, World

ROLES = ("upper", "compared", "lower")
METHODS = {"voco": "VoCo", "none": "uncompressed", "avg_pool": "average pooling", "q_former": "Q-Former", "fastv": "FastV"}
RESAMPLES = 2000

# The comparison as a table: a row of scores with the stage that it came from and its part in the comparison.
SUMMARY = pa.schema(
    [("stage", pa.string()), ("output", pa.string()), ("role", pa.string()), ("label", pa.string()), *rows.SCORES]
)


@dataclass(frozen=True)
class Difference:
    """Score of one method minus another's on the same questions, with its 95 % interval."""

    label: str
    other: str
    value: float
    low: float
    high: float
    questions: int

    @property
    def settled(self) -> bool:
        """True when the interval is on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """One benchmark: its rows of category "all" (upper bound first, lower bound last), its rows by category."""

    benchmark: str
    rows: list[dict[str, Any]]
    categories: list[str]
    by_category: list[dict[str, Any]]
    differences: list[Difference]
    unpaired: list[str]  # why a difference is missing

    def bound(self, role: str, category: str = ALL) -> float | None:
        """The score of a bound: its own evaluation's, else what every compared row says alike."""
        held = self.rows if category == ALL else [row for row in self.by_category if row["category"] == category]
        own = {row["score"] for row in held if row["role"] == role}
        said = {row[f"{role}_bound"] for row in held if row[f"{role}_bound"] is not None}
        values = own or said
        return float(next(iter(values))) if len(values) == 1 else None


def compare(world: World) -> list[Comparison]:
    """One comparison a benchmark, in the order in which they were evaluated."""
    evaluations = world.of_kind("evaluate")
    roles = _roles(evaluations)
    found: dict[str, list[tuple[Output, dict[str, Any]]]] = {}
    for output in evaluations:
        table = output.read("scores")
        for row in table.to_pylist() if table is not None else []:
            role = roles[output.uri]
            whole = {"stage": output.name, "output": output.uri, "role": role, "label": label(row, role), **row}
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


def label(row: dict[str, Any], role: str) -> str:
    """How a row is called in tables and plots."""
    if role == "upper":
        return "upper bound"
    if role == "lower":
        return "lower bound"
    name = METHODS.get(row["method"], row["method"])
    return f"{name}, {row['checkpoint'].rstrip('/').rsplit('/', 1)[-1]}" if row["method"] == "none" else f"{name}, N={row['n']}"


def _one(benchmark: str, held: list[tuple[Output, dict[str, Any]]]) -> Comparison:
    _tell_apart([row for _, row in held])
    order = sorted(held, key=lambda item: (ROLES.index(item[1]["role"]), -item[1]["score"]))
    whole = [(output, row) for output, row in order if row["category"] == ALL]
    places = [row["output"] for _, row in whole]
    by_category = sorted((row for _, row in order if row["category"] != ALL), key=lambda row: places.index(row["output"]))
    categories = sorted({row["category"] for row in by_category})
    differences, unpaired = _differences(whole)
    return Comparison(benchmark, [row for _, row in whole], categories, by_category, differences, unpaired)


def _tell_apart(held: list[dict[str, Any]]) -> None:
    """Labels that several outputs share get the stage's name, and their number where that is shared too."""
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


def _differences(whole: list[tuple[Output, dict[str, Any]]]) -> tuple[list[Difference], list[str]]:
    """Every VoCo evaluation against every other way to compress."""
    ours = [item for item in whole if item[1]["role"] == "compared" and item[1]["method"] == "voco"]
    others = [item for item in whole if item[1]["role"] == "compared" and item[1]["method"] not in ("voco", "none")]
    found, unpaired = [], []
    for output, row in ours:
        for other, against in others:
            held = {row["label"]: output.read("answers"), against["label"]: other.read("answers")}
            tables = {name: table for name, table in held.items() if table is not None}
            if len(tables) < 2:
                unpaired.append(f"{row['label']} against {against['label']}: answers are missing")
                continue
            try:
                samples, _, correct = join_correct(tables)
            except Refused as error:
                unpaired.append(str(error))
                continue
            drawn = bootstrap(correct, samples, RESAMPLES, row["seed"] or 0)
            low, high = drawn.difference(row["label"], against["label"])
            value = drawn.scores[row["label"]] - drawn.scores[against["label"]]
            found.append(Difference(row["label"], against["label"], value, low, high, len(samples)))
    return found, unpaired


def headline(comparison: Comparison) -> str:
    """The key result in words; only what the figures carry."""
    ours = [row for row in comparison.rows if row["role"] == "compared" and row["method"] == "voco"]
    if not ours:
        return f"{comparison.benchmark}: no VoCo checkpoint was evaluated."
    best = ours[0]
    text = f"{best['label']} answers {100 * best['score']:.1f} % of {best['questions']:,} questions right"
    if best["retention"] is None:
        text += "; without both bounds nothing can be said of what it keeps."
    else:
        text += (
            f", against {100 * best['upper_bound']:.1f} % uncompressed and {100 * best['lower_bound']:.1f} % at the lower bound: "
            f"it keeps {100 * best['retention']:.1f} % of what lies between them{_interval(best, 'retention')}."
        )
    if best["cache_bytes"] and best["full_cache_bytes"]:
        text += f" Its cache is {best['full_cache_bytes'] / best['cache_bytes']:,.0f} times smaller than the full one."
    for difference in comparison.differences:
        if difference.label == best["label"]:
            text += " " + difference_in_words(difference)
    return text


def difference_in_words(difference: Difference, whole: bool = False) -> str:
    """One sentence; `whole` names both methods and the number of questions."""
    points = f"{abs(100 * difference.value):.1f} points {'above' if difference.value > 0 else 'below'} {difference.other}"
    interval = f"95 % interval of the paired difference {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    if whole:
        interval += f", over {difference.questions:,} questions"
    end = "" if difference.settled else "; zero is inside, so the order of the two is open"
    return f"{difference.label if whole else 'It'} is {points} ({interval}{end})."


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None or high is None else f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"
