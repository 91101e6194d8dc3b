"""One HTML file from any outputs: it carries its own style, plots and images, asks for nothing and runs no script."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.compute as pc
from markupsafe import Markup

from voco import rows, storage
from voco.evaluate.scores import ALL
from voco.report import flow_picture, plots, table
from voco.report.comparison import Comparison, compare, difference_in_words, headline
from voco.report.outputs import Output, World, gather
from voco.report.pictures import Picture, first_rows, picture, rows_by_id

SAMPLES_SHOWN = 3  # of each samples table
QUESTIONS_SHOWN = 12  # side by side, of each benchmark
CONVERSATIONS_SHOWN = 3  # of each sample
LONGEST_TEXT = 600  # characters of one text


def write(outputs: list[str], to: str, title: str) -> str:
    """Write the report on `outputs` (of any kind, local or s3://) as one file at `to`, and return `to`.

    The stages of a flow and the parents of every output are found and shown too. What is missing is written as missing.
    Raises Refused when nothing is finished.
    """
    storage.write_bytes(to, page(gather(outputs), title).encode())
    return to


def page(world: World, title: str) -> str:
    """The whole page as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "percent": table.percent,
        "span": table.span,
        "bytes": table.bytes_text,
        "duration": table.seconds_text,
        "flops": table.flops_text,
        "short": _short,
        "number": _number,
    }
    comparisons = compare(world)
    return environment.get_template("report.html").render(
        title=title,
        world=world,
        picture=Markup(flow_picture.flow_picture(world)),
        headlines=[headline(comparison) for comparison in comparisons],
        ingests=[_ingest(output) for output in world.of_kind("ingest")],
        training=_training(world),
        comparisons=[_comparison(world, comparison) for comparison in comparisons],
        unscored=[output.name for output in world.of_kind("evaluate") if output.read("scores") is None],
        conversations_shown=CONVERSATIONS_SHOWN,
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def _number(value: object) -> str:
    """A figure of a manifest, as it stands there apart from its digits being grouped."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"


def _ingest(output: Output) -> dict[str, Any]:
    """Counts, statistics and a few rows of one samples table."""
    shown = [{"row": row, "picture": picture(row["media"] or [])} for row in first_rows(output, SAMPLES_SHOWN)]
    counts = output.manifest.counts
    rejected = counts.get("rejected") or {}
    figures, facts = _statistics(output.manifest.statistics)
    return {
        "output": output, "counts": counts, "rejected": rejected, "lost": sum(rejected.values()),
        "figures": figures, "facts": facts, "shown": shown,
    }  # fmt: skip


def _statistics(statistics: dict[str, Any]) -> tuple[list[tuple[str, list[str], dict[str, Any]]], list[tuple[str, Any]]]:
    """Nested statistics as tables (name, columns, rows) where every entry has the same columns, else as flat facts."""
    tables: list[tuple[str, list[str], dict[str, Any]]] = []
    facts: list[tuple[str, Any]] = []
    for name, value in statistics.items():
        entries = list(value.values()) if isinstance(value, dict) else []
        if entries and all(isinstance(entry, dict) and entry and entry.keys() == entries[0].keys() for entry in entries):
            tables.append((name, sorted(entries[0], key=_column_order), value))
        elif isinstance(value, dict):
            inner_tables, inner = _statistics(value)
            tables += [(f"{name}: {key}", columns, held) for key, columns, held in inner_tables]
            facts += [(f"{name}: {key}", held) for key, held in inner]
        else:
            facts.append((name, value))
    return tables, facts


def _column_order(name: str) -> tuple[int, str]:
    known = ("count", "min", "mean", "max", "sum")
    return (known.index(name) if name in known else len(known), name)


@dataclass(frozen=True)
class _Run:
    """One training run in figures; None where its metrics have none."""

    output: Output
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None

    @property
    def rate(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def _training(world: World) -> dict[str, Any]:
    runs, lines = [], []
    for output in world.of_kind("image_sft"):
        place = storage.join(output.uri, "metrics.parquet")
        held = rows.read_table(place).sort_by("step") if storage.exists(place) else None
        if held is None or held.num_rows == 0:
            runs.append(_Run(output))
            continue
        curve = plots.Curve(output.name, held["step"].to_numpy().astype(float), held["loss"].to_numpy().astype(float))
        lines.append(curve)
        mean = plots.smooth(curve.y)
        tokens, seconds = sum(held["tokens"].drop_null().to_pylist()), sum(held["seconds"].drop_null().to_pylist())
        runs.append(_Run(output, held.num_rows, float(mean[0]), float(mean[-1]), int(tokens), float(seconds)))
    plot = plots.curves("training loss by step", lines, "step", "loss per supervised token") if lines else ""
    return {"runs": runs, "plot": Markup(plot), "legend": [line.label for line in lines]}


def _comparison(world: World, comparison: Comparison) -> dict[str, Any]:
    """One benchmark: the template's values."""
    columns = [row["label"] for row in comparison.rows]
    cells = {(row["category"], row["label"]): row for row in comparison.by_category}
    questions = {row["category"]: row["questions"] for row in comparison.by_category}
    chosen, reason = side_by_side(world, comparison)
    return {
        "it": comparison, "columns": columns, "cells": cells, "questions": questions,
        "bars": Markup(_bars(comparison)), "dots": Markup(_dots(comparison)),
        "compared": [row["label"] for row in comparison.rows if row["role"] == "compared"],
        "differences": [difference_in_words(difference, whole=True) for difference in comparison.differences],
        "chosen": chosen, "reason": reason,
    }  # fmt: skip


def _bar(row: dict[str, Any]) -> plots.Bar:
    low, high = (None if row[name] is None else 100 * row[name] for name in ("score_low", "score_high"))
    return plots.Bar(row["label"], 100 * row["score"], low, high, muted=row["role"] != "compared")


def _bounds(comparison: Comparison, category: str = ALL) -> list[tuple[str, float]]:
    held = [(role, comparison.bound(role, category)) for role in ("lower", "upper")]
    return [(f"{role} bound", 100 * value) for role, value in held if value is not None]


def _bars(comparison: Comparison) -> str:
    return plots.bars("score by method", [_bar(row) for row in comparison.rows], _bounds(comparison)) if comparison.rows else ""


def _dots(comparison: Comparison) -> str:
    groups = []
    for category in comparison.categories:
        held = [row for row in comparison.by_category if row["category"] == category and row["role"] == "compared"]
        if held:
            groups.append((category, [_bar(row) for row in held], _bounds(comparison, category)))
    return plots.dots("score by question category", groups) if groups else ""


def side_by_side(world: World, comparison: Comparison) -> tuple[list[dict[str, Any]], str]:
    """Questions with the answer of every evaluation, and why there are none.

    Which questions: the least hashes of their keys, in turn from each category and never two of one sample, so that no
    result has a hand in the choice.
    """
    answers: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    sources: list[Output] = []
    for row in comparison.rows:
        output = world.at(row["output"])
        held = output.read("answers") if output is not None else None
        if output is not None and held is not None:
            mine = held.filter(pc.equal(held["benchmark"], comparison.benchmark)).to_pylist()
            answers[row["label"]] = {(line["sample_id"], line["conversation_index"]): line for line in mine}
            found = [world.at(uri) for uri in output.samples_inputs() or [parent.uri for parent in output.parents]]
            sources += [parent for parent in found if parent is not None and parent.kind == "ingest" and parent not in sources]
    if not answers:
        return [], "The answers are missing."
    common = set.intersection(*(set(held) for held in answers.values()))
    if not common:
        return [], "The evaluations have no question in common."
    first = next(iter(answers.values()))
    keys = choose({key: str(first[key]["category"]) for key in common}, QUESTIONS_SHOWN)
    media = rows_by_id(sources, {sample_id for sample_id, _ in keys})
    return [
        {
            "picture": picture(media[key[0]]["media"] or []) if key[0] in media else Picture(problem="image missing: no samples"),
            "question": _question(media.get(key[0]), key[1]) or first[key]["prompt"],
            "category": first[key]["category"],
            "references": first[key]["references"] or [],
            "answers": [(label, held[key]) for label, held in answers.items()],
        }
        for key in keys
    ], ""


def _question(row: dict[str, Any] | None, index: int) -> str | None:
    """The last user turn of a conversation, as ingested; the prompt has the template around it."""
    conversations = (row or {}).get("conversations") or []
    if index >= len(conversations) or not conversations[index]["turns"]:
        return None
    return str(conversations[index]["turns"][-1]["text"])


def choose(category_of: dict[tuple[str, int], str], count: int) -> list[tuple[str, int]]:
    """`count` keys, in turn from each category by the hash of the key, at most one of each sample."""
    queues: dict[str, list[tuple[str, int]]] = {}
    for key in sorted(category_of, key=lambda key: hashlib.sha256(f"{key[0]}:{key[1]}".encode()).digest()):
        queues.setdefault(category_of[key], []).append(key)
    chosen: list[tuple[str, int]] = []
    used: set[str] = set()
    while len(chosen) < count and any(queues.values()):
        for category in sorted(queues):
            queue = queues[category]
            while queue and queue[0][0] in used:
                queue.pop(0)
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
                used.add(chosen[-1][0])
    return chosen
