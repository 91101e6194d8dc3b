"""SEED-Bench: cases by hand from LLaVA's rule, and the accuracies of the set."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric, official_figures

CASES = [
    ("A", "A", 1.0),
    ("B", "B", 1.0),
    ("C", "C", 1.0),
    ("D", "D", 1.0),
    ("E", "E", 1.0),
    ("A", "B", 0.0),
    ("B", "A", 0.0),
    ("D", "C", 0.0),
    ("a", "A", 0.0),
    ("b", "B", 0.0),
    ("d", "D", 0.0),
    ("A.", "A", 0.0),
    ("B.", "B", 0.0),
    ("A)", "A", 0.0),
    ("(A)", "A", 0.0),
    ("(B", "B", 0.0),
    ("A:", "A", 0.0),
    ("A,", "A", 0.0),
    (" A", "A", 1.0),
    ("A ", "A", 1.0),
    ("A\n", "A", 1.0),
    ("\tB\n", "B", 1.0),
    ("A. cat", "A", 0.0),
    ("A cat", "A", 0.0),
    ("A\ncat", "A", 0.0),
    ("AB", "A", 0.0),
    ("AA", "A", 0.0),
    ("A B", "A", 0.0),
    ("A or B", "A", 0.0),
    ("The answer is A", "A", 0.0),
    ("Answer: A", "A", 0.0),
    ("Option A", "A", 0.0),
    ("cat", "A", 0.0),
    ("", "A", 0.0),
    (" ", "A", 0.0),
    (".", "A", 0.0),
    ("1", "A", 0.0),
    ("Z", "A", 0.0),
    ('"A"', "A", 0.0),
    ("**A**", "A", 0.0),
    ("[A]", "A", 0.0),
    ("A?", "A", 0.0),
]


@pytest.mark.parametrize(("prediction", "reference", "mark"), CASES)
def test_marks(prediction: str, reference: str, mark: float) -> None:
    assert get_metric("seed").mark(prediction, [reference]) == mark


def row(category: str, mark: float, image: str | None = None) -> dict[str, object]:
    return {"prediction": "A", "references": ["A"], "mark": mark, "category": category, "image": image}


def test_image_and_video_by_the_type() -> None:
    rows = [row("Scene Understanding", 1), row("Instance Attribute", 0), row("3", 1), row("Action Recognition", 0), row("12", 1)]
    figures = official_figures(get_metric("seed"), rows)
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["image_accuracy"] == pytest.approx(2 / 3)
    assert figures["video_accuracy"] == pytest.approx(1 / 2)
    assert figures["Scene Understanding/accuracy"] == 1.0
    assert figures["Instance Attribute/accuracy"] == 0.0


def test_image_and_video_by_the_folder_of_the_file() -> None:
    rows = [row("", 1, "SEED-Bench-image/1454426"), row("", 0, "SEED-Bench-video-image/10_101.png"), row("", 1, "1.png")]
    figures = official_figures(get_metric("seed"), rows)
    assert figures == {"accuracy": pytest.approx(2 / 3), "image_accuracy": 1.0, "video_accuracy": 0.0}
