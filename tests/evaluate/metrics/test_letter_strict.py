"""LLaVA's strict letter rule: cases by hand."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric

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
    ("Α", "A", 0.0),  # a Greek letter
]


@pytest.mark.parametrize(("prediction", "reference", "mark"), CASES)
def test_marks(prediction: str, reference: str, mark: float) -> None:
    assert get_metric("letter_strict").mark(prediction, [reference]) == mark
