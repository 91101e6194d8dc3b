"""What simple readers would score on the demo's test scenes, to read a result beside: `python -m voco.demo.yardsticks DATA`.

`majority` always gives a category's most common answer. `no places` knows the four shapes of a scene, but not which is
where: it is right by count and presence, and guesses the commonest label elsewhere.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from voco.demo import easy_vqa_shapes

SIDE = 64  # pixels of one easy-VQA image
CORNERS = ((0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE))
Label = tuple[str, str]  # colour, shape


def majority(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy by category of the most common answer."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[row["category"]][row["conversations"][1]["value"]] += 1
    return {category: max(counts.values()) / counts.total() for category, counts in answers.items()}


def no_places(rows: list[dict[str, Any]], images: Path) -> dict[str, float]:
    """Accuracy by category of a reader of shapes and colours without places."""
    known = _labels_by_pixels()
    scenes: dict[str, list[Label]] = {}
    right: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["image"] not in scenes:
            scene = Image.open(images / row["image"]).convert("RGB")
            scenes[row["image"]] = [known[scene.crop((x, y, x + SIDE, y + SIDE)).tobytes()] for x, y in CORNERS]
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        right[row["category"]].append(_chance(row["category"], question, scenes[row["image"]]))
    return {category: sum(found) / len(found) for category, found in right.items()}


def _chance(category: str, question: str, shapes: list[Label]) -> float:
    if category in ("count", "presence"):
        return 1.0
    candidates = list(shapes)
    if category == "neighbour":  # the shape that the question names is not its own neighbour
        colour, shape = question.rstrip("?").split()[-2:]
        candidates.remove((colour, shape))
    asked = 1 if question.split()[1] == "shape" else 0
    return max(Counter(one[asked] for one in candidates).values()) / len(candidates)


def _labels_by_pixels() -> dict[bytes, Label]:
    labels = easy_vqa_shapes.labels(easy_vqa_shapes.shape_questions("test"))
    folder = easy_vqa_shapes.folder("test") / "images"
    return {Image.open(folder / f"{number}.png").convert("RGB").tobytes(): label for number, label in labels.items()}


def main(data: Path) -> None:
    rows = json.loads((data / "scenes_test.json").read_text())
    sizes = Counter(row["category"] for row in rows)
    for name, found in (("majority", majority(rows)), ("no places", no_places(rows, data / "images"))):
        whole = sum(found[category] * size for category, size in sizes.items()) / sizes.total()
        print(f"{name:<10} all {whole:.1%}, " + ", ".join(f"{category} {found[category]:.1%}" for category in sorted(found)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
