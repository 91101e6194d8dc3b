"""Comparison: scores and what is kept, by method and by question category, and paired differences."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from voco.evaluate.scores import ALL
from voco.report import plots
from voco.report.comparison import Comparison
from voco.report.differences import VARIANTS, Difference, difference_text


def benchmark_section(comparison: Comparison) -> dict[str, Any]:
    """One benchmark: the template's values."""
    variants = [difference for difference in comparison.differences if difference.other_method in VARIANTS]
    return {
        "it": comparison,
        "columns": [row["label"] for row in comparison.rows],
        "cells": {(row["category"], row["label"]): row for row in comparison.by_category},
        "questions": {row["category"]: row["questions"] for row in comparison.by_category},
        "bars": Markup(_bars(comparison)), "dots": Markup(_dots(comparison)),
        "compared": [row["label"] for row in comparison.rows if row["role"] == "compared"],
        "differences": [difference_text(difference, whole=True) for difference in comparison.differences if difference.category == ALL],
        "variants": _variants(variants),
    }  # fmt: skip


def _variants(found: list[Difference]) -> dict[str, Any]:
    """In-order answers minus those to less than the video: a row of each category, a column of each pair."""
    pairs = list(dict.fromkeys((difference.label, difference.other) for difference in found))
    return {
        "pairs": pairs,
        "categories": list(dict.fromkeys(difference.category for difference in found)),
        "cells": {(difference.category, difference.label, difference.other): difference for difference in found},
    }


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
