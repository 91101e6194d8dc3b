"""lmms-eval's lenient letter rule: cases by hand."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric

CASES = [
    ("A", "A", 1.0),
    ("B", "B", 1.0),
    ("C", "C", 1.0),
    ("D", "D", 1.0),
    ("A", "B", 0.0),
    ("B", "A", 0.0),
    ("a", "A", 1.0),
    ("b", "B", 1.0),
    ("d", "D", 1.0),
    ("a", "B", 0.0),
    ("A", "a", 1.0),
    ("A.", "A", 1.0),
    ("B.", "B", 1.0),
    ("b.", "B", 1.0),
    ("A)", "A", 1.0),
    ("A:", "A", 1.0),
    ("A,", "A", 1.0),
    ("(A)", "A", 0.0),  # the first character is a bracket
    ("(B", "B", 0.0),
    ("[A]", "A", 0.0),
    ("**A**", "A", 0.0),
    ('"A"', "A", 0.0),
    (" A", "A", 1.0),
    ("A ", "A", 1.0),
    ("A\n", "A", 1.0),
    ("\tB\n", "B", 1.0),
    ("A. cat", "A", 1.0),
    ("A cat", "A", 1.0),
    ("A\ncat", "A", 1.0),
    ("AB", "A", 1.0),
    ("A or B", "A", 1.0),
    ("A or B", "B", 0.0),
    ("B) a dog", "B", 1.0),
    ("both", "B", 1.0),  # every word with that initial
    ("cat", "C", 1.0),
    ("dog", "D", 1.0),
    ("an apple", "A", 1.0),
    ("blue", "B", 1.0),
    ("The answer is A", "A", 0.0),
    ("Answer: A", "A", 1.0),
    ("Answer: B", "A", 1.0),  # by its initial
    ("Answer: B", "B", 0.0),
    ("Option A", "A", 0.0),
    ("", "A", 0.0),
    (" ", "A", 0.0),
    (".", "A", 0.0),
    ("1", "A", 0.0),
]


@pytest.mark.parametrize(("prediction", "reference", "mark"), CASES)
def test_marks(prediction: str, reference: str, mark: float) -> None:
    assert get_metric("letter_lenient").mark(prediction, [reference]) == mark
