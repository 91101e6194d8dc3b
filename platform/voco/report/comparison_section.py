"""Comparison section: score and retention by method and by question category, and paired differences."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from voco.report import plots
from voco.report.comparison import Comparison
from voco.report.differences import FRAME_VARIANTS, Difference, difference_text
from voco.store.schemas import ALL


def benchmark_section(comparison: Comparison) -> dict[str, Any]:
    """The template's values for one benchmark."""
    overall = [difference for difference in comparison.differences if difference.category == ALL]
    variants = [difference for difference in comparison.differences if difference.other_method in FRAME_VARIANTS]
    return {
        "comparison": comparison,
        "columns": [row["label"] for row in comparison.rows],
        "cells": {(row["category"], row["label"]): row for row in comparison.by_category},
        "questions": {row["category"]: row["questions"] for row in comparison.by_category},
        "bars": Markup(_bars(comparison)), "dots": Markup(_dots(comparison)),
        "compared": [row["label"] for row in comparison.rows if row["role"] == "compared"],
        "differences": [difference_text(difference, standalone=True) for difference in overall],
        "variants": _variants(variants),
    }  # fmt: skip


def _variants(differences: list[Difference]) -> dict[str, Any]:
    """All frames in order minus each frame variant: one row per category, one column per pair."""
    pairs = list(dict.fromkeys((difference.label, difference.other) for difference in differences))
    return {
        "pairs": pairs,
        "categories": list(dict.fromkeys(difference.category for difference in differences)),
        "cells": {(difference.category, difference.label, difference.other): difference for difference in differences},
    }


def _bar(row: dict[str, Any]) -> plots.Bar:
    low, high = (None if row[name] is None else 100 * row[name] for name in ("score_low", "score_high"))
    return plots.Bar(row["label"], 100 * row["score"], low, high, muted=row["role"] != "compared")


def _bounds(comparison: Comparison, category: str = ALL) -> list[tuple[str, float]]:
    scores = [(role, comparison.bound(role, category)) for role in ("lower", "upper")]
    return [(f"{role} bound", 100 * score) for role, score in scores if score is not None]


def _bars(comparison: Comparison) -> str:
    return plots.bars("score by method", [_bar(row) for row in comparison.rows], _bounds(comparison)) if comparison.rows else ""


def _dots(comparison: Comparison) -> str:
    groups = []
    for category in comparison.categories:
        rows = [row for row in comparison.by_category if row["category"] == category and row["role"] == "compared"]
        if rows:
            groups.append((category, [_bar(row) for row in rows], _bounds(comparison, category)))
    return plots.dots("score by question category", groups) if groups else ""
