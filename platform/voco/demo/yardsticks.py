"""Scores of two simple baselines on the demo's test scenes, to compare a result with: `python -m voco.demo.yardsticks DATA`.

`majority` always gives a category's most common answer. `no places` knows the four shapes of a scene but not their places:
it is always right about count and presence, and guesses the most common label in the other categories.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from voco.demo import easy_vqa_shapes
from voco.demo.easy_vqa_shapes import Label
from voco.demo.scenes import CELL

CORNERS = ((0, 0), (CELL, 0), (0, CELL), (CELL, CELL))  # (x, y) of the four cells


def majority(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of the most common answer, by category."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[row["category"]][row["conversations"][1]["value"]] += 1
    return {category: max(counts.values()) / counts.total() for category, counts in answers.items()}


def without_places(rows: list[dict[str, Any]], images: Path) -> dict[str, float]:
    """Accuracy of a baseline that knows the shapes and colours but not their places, by category."""
    labels = _labels_by_pixels()
    scenes: dict[str, list[Label]] = {}
    right: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["image"] not in scenes:
            scene = Image.open(images / row["image"]).convert("RGB")
            scenes[row["image"]] = [labels[scene.crop((x, y, x + CELL, y + CELL)).tobytes()] for x, y in CORNERS]
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        right[row["category"]].append(_chance(row["category"], question, scenes[row["image"]]))
    return {category: sum(chances) / len(chances) for category, chances in right.items()}


def _chance(category: str, question: str, shapes: list[Label]) -> float:
    """The probability of a right answer."""
    if category in ("count", "presence"):
        return 1.0
    candidates = list(shapes)
    if category == "neighbour":  # the answer is not the shape that the question names
        colour, shape = question.rstrip("?").split()[-2:]
        candidates.remove((colour, shape))
    field = 1 if question.split()[1] == "shape" else 0
    return max(Counter(label[field] for label in candidates).values()) / len(candidates)


def _labels_by_pixels() -> dict[bytes, Label]:
    labels = easy_vqa_shapes.labels(easy_vqa_shapes.shape_questions("test"))
    folder = easy_vqa_shapes.folder("test") / "images"
    return {Image.open(folder / f"{number}.png").convert("RGB").tobytes(): label for number, label in labels.items()}


def main(data: Path) -> None:
    rows = json.loads((data / "scenes_test.json").read_text())
    sizes = Counter(row["category"] for row in rows)
    for name, scores in (("majority", majority(rows)), ("no places", without_places(rows, data / "images"))):
        overall = sum(scores[category] * size for category, size in sizes.items()) / sizes.total()
        print(f"{name:<10} all {overall:.1%}, " + ", ".join(f"{category} {scores[category]:.1%}" for category in sorted(scores)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
