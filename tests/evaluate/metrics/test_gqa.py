"""GQA's exact match: cases by hand from LLaVA's converter."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric

CASES = [
    ("red", ["red"], 1.0),
    ("Red", ["red"], 1.0),
    ("RED", ["red"], 1.0),
    ("red", ["RED"], 1.0),
    ("red.", ["red"], 1.0),
    ("red...", ["red"], 1.0),
    ("red", ["red."], 1.0),
    ("  red  ", ["red"], 1.0),
    ("red\n", ["red"], 1.0),
    ("\tred", ["red"], 1.0),
    ("red .", ["red"], 1.0),
    (" Red. ", ["red"], 1.0),
    ("blue", ["red"], 0.0),
    ("reddish", ["red"], 0.0),
    ("red car", ["red"], 0.0),
    ("red", ["red car"], 0.0),
    ("red car", ["red car"], 1.0),
    ("the red", ["red"], 0.0),
    ("a red", ["red"], 0.0),
    ("red, blue", ["red"], 0.0),
    ("red,", ["red"], 0.0),
    ("red!", ["red"], 0.0),
    ("red?", ["red"], 0.0),
    (".red", ["red"], 0.0),
    ("two", ["2"], 0.0),
    ("2", ["two"], 0.0),
    ("two", ["two", "2"], 1.0),
    ("2", ["two", "2"], 1.0),
    ("three", ["two", "2"], 0.0),
    ("3.5", ["35"], 0.0),
    ("3.5", ["3.5"], 1.0),
    ("t-shirt", ["t shirt"], 0.0),
    ("t-shirt", ["t-shirt"], 1.0),
    ("isn't", ["isnt"], 0.0),
    ("yes", ["yes"], 1.0),
    ("Yes", ["no"], 0.0),
    ("red  car", ["red car"], 0.0),
    ("left", ["right"], 0.0),
    ("", ["red"], 0.0),
    ("", [""], 0.0),  # an empty answer is wrong
    ("", ["."], 0.0),
    ("", ["..."], 0.0),
    (".", ["."], 0.0),
    (" ", [""], 0.0),
    ("...", ["red"], 0.0),
    ("red", [], 0.0),
    ("", [], 0.0),
]


@pytest.mark.parametrize(("prediction", "references", "mark"), CASES)
def test_marks(prediction: str, references: list[str], mark: float) -> None:
    assert get_metric("gqa").mark(prediction, references) == mark
