"""SEED-Bench: cases by hand from LLaVA's rule, and the accuracies of the set."""

from __future__ import annotations

import pytest
from evaluate.metrics.letter_cases import CASES

from voco.evaluate.metrics import get_metric, official_figures


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
