"""F1 of shared words in SQuAD's form: cases by hand."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric, official_figures

CASES = [
    ("bread", ["bread"], 1.0),
    ("Bread.", ["bread"], 1.0),
    ("the bread", ["a bread"], 1.0),
    ("bread", ["butter"], 0.0),
    ("bread and butter", ["bread"], 1 / 2),
    ("bread", ["bread and butter"], 1 / 2),
    ("bread butter", ["bread"], 2 / 3),
    ("bread butter", ["butter bread"], 1.0),
    ("red big car", ["red car"], 4 / 5),
    ("red car", ["big red car"], 4 / 5),
    ("red car", ["blue car"], 1 / 2),
    ("a red car", ["the blue car"], 1 / 2),
    ("red red car", ["red car"], 4 / 5),
    ("red red", ["red"], 2 / 3),
    ("red", ["red red"], 2 / 3),
    ("red red", ["red red"], 1.0),
    ("one two three", ["four five"], 0.0),
    ("one two three", ["three"], 1 / 2),
    ("one two three four", ["one two"], 2 / 3),
    ("one two three four", ["four"], 2 / 5),
    ("man", ["men"], 0.0),
    ("t-shirt", ["t shirt"], 0.0),
    ("t-shirt", ["tshirt"], 1.0),
    ("it's red", ["its red"], 1.0),
    ("red", ["blue", "red car"], 2 / 3),
    ("red", ["blue", "red"], 1.0),
    ("red", ["red car", "red"], 1.0),
    ("red car", ["red", "car"], 2 / 3),
    ("yes it is", ["yes"], 1 / 2),
    ("yes, it is", ["yes"], 1 / 2),
    ("no", ["yes"], 0.0),
    ("Yes", ["yes"], 1.0),
    ("he plays the guitar", ["play guitar"], 2 / 5),
    ("play guitar", ["play the guitar"], 1.0),
    ("playing guitar", ["play guitar"], 1 / 2),
    ("two", ["2"], 0.0),
    ("2 dogs", ["two dogs"], 1 / 2),
    ("1,000 people", ["1000"], 2 / 3),
    ("the the the", ["the"], 0.0),
    ("", ["bread"], 0.0),
    ("", [""], 0.0),
    ("", ["."], 0.0),
    (".", ["..."], 0.0),
    ("a", ["the"], 0.0),
    ("bread", [""], 0.0),
    ("bread", [], 0.0),
]


@pytest.mark.parametrize(("prediction", "references", "mark"), CASES)
def test_marks(prediction: str, references: list[str], mark: float) -> None:
    assert get_metric("token_f1").mark(prediction, references) == pytest.approx(mark)


def test_the_figure_is_named_f1() -> None:
    rows = [{"mark": 1.0, "category": "number"}, {"mark": 0.5, "category": "color"}]
    assert official_figures(get_metric("token_f1"), rows) == {"f1": 0.75, "color/f1": 0.5, "number/f1": 1.0}
