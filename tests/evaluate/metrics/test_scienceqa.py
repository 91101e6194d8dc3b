"""ScienceQA: cases by hand from LLaVA's reading of a letter, and the accuracy of questions with an image."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric, official_figures

CASES = [
    ("A", "A", 1.0),
    ("B", "B", 1.0),
    ("E", "E", 1.0),
    ("B", "A", 0.0),
    ("a", "A", 0.0),
    ("F", "F", 0.0),  # A to E are options
    (" B ", "B", 1.0),
    ("A\n", "A", 1.0),
    ("A.", "A", 0.0),  # a full stop without a blank
    ("A. cat", "A", 1.0),
    ("E. last", "E", 1.0),
    ("B.  two", "B", 1.0),
    ("A.cat", "A", 0.0),
    ("a. cat", "A", 0.0),
    ("F. six", "F", 0.0),
    ("A) cat", "A", 0.0),
    ("(A) cat", "A", 0.0),
    ("(A)", "A", 0.0),
    ("A: cat", "A", 0.0),
    ("A, cat", "A", 0.0),
    ("A cat", "A", 0.0),
    ("A . cat", "A", 0.0),
    ("AB", "A", 0.0),
    ("A\nbecause", "A", 1.0),  # a line end counts as `. `
    ("A.\nBecause", "A", 0.0),  # `A.. Because`
    ("The answer is A.", "A", 1.0),
    ("The answer is A", "A", 1.0),
    ("The answer is B.", "A", 0.0),
    ("the answer is A.", "A", 0.0),
    ("The Answer is A.", "A", 0.0),
    ("The answer is (A).", "A", 0.0),
    ("The answer is  A", "A", 0.0),
    ("The answer is: A", "A", 0.0),
    ("The answer is a", "A", 0.0),
    ("Because of gravity. The answer is C.", "C", 1.0),
    ("I think\nThe answer is D.", "D", 1.0),
    ("The answer is\nC", "C", 0.0),
    ("The answer is A or B.", "A", 1.0),
    ("The answer is A. The answer is B.", "A", 1.0),
    ("The answer is A, no. The answer is B.", "B", 1.0),  # one with a full stop comes first
    ("B. The answer is C.", "B", 1.0),  # a letter at the start comes before the sentence
    ("The answer is Cat.", "C", 1.0),
    ("Answer: B", "B", 0.0),
    ("cat", "A", 0.0),
    ("", "A", 0.0),
    (" ", "A", 0.0),
]


@pytest.mark.parametrize(("prediction", "reference", "mark"), CASES)
def test_marks(prediction: str, reference: str, mark: float) -> None:
    assert get_metric("scienceqa").mark(prediction, [reference]) == mark


def test_the_published_figure_counts_questions_with_an_image() -> None:
    rows = [
        {"prediction": "A", "references": ["A"], "mark": mark, "image": image, "category": subject}
        for mark, image, subject in [
            (1.0, "4/image.png", "natural science"),
            (0.0, None, "social science"),
            (0.0, "", "natural science"),
        ]
    ]
    assert official_figures(get_metric("scienceqa"), rows) == {
        "img_accuracy": 1.0, "accuracy": pytest.approx(1 / 3),
        "natural science/accuracy": 0.5, "social science/accuracy": 0.0,
    }  # fmt: skip
