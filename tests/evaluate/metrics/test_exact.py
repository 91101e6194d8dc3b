"""Exact match of short answers in SQuAD's form: cases by hand."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric

CASES = [
    ("bread", ["bread"], 1.0),
    ("Bread", ["bread"], 1.0),
    ("bread.", ["bread"], 1.0),
    ("bread!", ["bread"], 1.0),
    ("BREAD?", ["bread"], 1.0),
    (" bread\n", ["bread"], 1.0),
    ("the bread", ["bread"], 1.0),
    ("a bread", ["bread"], 1.0),
    ("an onion", ["onion"], 1.0),
    ("bread", ["the bread"], 1.0),
    ("theatre", ["atre"], 0.0),  # an article is a whole word
    ("athlete", ["thlete"], 0.0),
    ("man", ["woman"], 0.0),
    ("men", ["man"], 0.0),
    ("bread and butter", ["bread"], 0.0),
    ("bread", ["bread and butter"], 0.0),
    ("bread  and   butter", ["bread and butter"], 1.0),
    ("bread, and butter", ["bread and butter"], 1.0),
    ("butter and bread", ["bread and butter"], 0.0),
    ("t-shirt", ["tshirt"], 1.0),  # marks are deleted, never blanks
    ("t-shirt", ["t shirt"], 0.0),
    ("don't", ["dont"], 1.0),
    ("it's", ["its"], 1.0),
    ("3.5", ["35"], 1.0),
    ("1,000", ["1000"], 1.0),
    ("two", ["2"], 0.0),
    ("2", ["two"], 0.0),
    ("2", ["2"], 1.0),
    ("yes", ["yes"], 1.0),
    ("Yes, it is", ["yes"], 0.0),
    ("no", ["yes"], 0.0),
    ("red", ["blue", "red"], 1.0),
    ("green", ["blue", "red"], 0.0),
    ("play the guitar", ["play guitar"], 1.0),
    ("play a guitar", ["play the guitar"], 1.0),
    ('"guitar"', ["guitar"], 1.0),
    ("(guitar)", ["guitar"], 1.0),
    ("café", ["cafe"], 0.0),
    ("CAFÉ", ["café"], 1.0),
    ("", ["bread"], 0.0),
    ("", [""], 0.0),
    ("", ["."], 0.0),
    (".", ["."], 0.0),
    ("the", ["a"], 0.0),  # no words at all
    (" ", ["bread"], 0.0),
    ("bread", [], 0.0),
]


@pytest.mark.parametrize(("prediction", "references", "mark"), CASES)
def test_marks(prediction: str, references: list[str], mark: float) -> None:
    assert get_metric("exact").mark(prediction, references) == mark
