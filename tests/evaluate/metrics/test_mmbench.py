"""MMBench: cases by hand from the published matching of options, and CircularEval."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric, official_figures

CASES = [
    ("B", "B", 1.0),
    ("B.", "B", 1.0),
    ("B,", "B", 1.0),
    ("B:", "B", 1.0),
    ("B)", "B", 1.0),
    ("B).", "B", 1.0),
    ("(B)", "B", 1.0),
    ("(B).", "B", 1.0),
    (":B", "B", 1.0),
    ("A", "B", 0.0),
    (" D\n", "D", 1.0),
    ("b", "B", 0.0),  # letters are capital
    ("B. dog", "B", 1.0),
    ("B. cat", "B", 1.0),  # the letter comes before the text
    ("B. cat", "A", 0.0),
    ("Answer: B", "B", 1.0),
    ("Answer:B", "B", 0.0),  # no word of its form
    ("Option D", "D", 1.0),
    ("option d", "D", 0.0),
    ("I choose C", "C", 1.0),
    ("It is (C) red car", "C", 1.0),
    ("[D]", "D", 0.0),
    ("**D**", "D", 0.0),
    ("A or B", "A", 0.0),  # two letters
    ("A or B", "B", 0.0),
    ("A, not B", "B", 1.0),  # bare letters are tried first
    ("A. cat B. dog", "A", 0.0),
    ("A dog", "A", 1.0),  # up to three words `A` is the letter
    ("A dog is here", "B", 1.0),  # from four words on it is the article
    ("The answer is A", "A", 0.0),  # also here
    ("The answer is A.", "A", 1.0),
    ("The answer is B", "B", 1.0),
    ("Answer: (A)", "A", 1.0),
    ("E", "A", 0.0),
    ("dog", "B", 1.0),
    ("The dog.", "B", 1.0),
    ("DOG", "B", 1.0),
    ("a dog and a cat", "B", 0.0),  # two options
    ("the red car", "C", 1.0),
    ("the car is red", "C", 0.0),
    ("birds", "D", 1.0),
    ("catfish", "A", 1.0),  # a text is looked for in the answer, not word by word
    ("a bird in a car", "D", 1.0),
    ("horse", "A", 0.0),
    ("", "A", 0.0),
    ("  ", "A", 0.0),
]


@pytest.mark.parametrize(("prediction", "reference", "mark"), CASES)
def test_marks(prediction: str, reference: str, mark: float) -> None:
    assert get_metric("mmbench").mark(prediction, [reference], CHOICES) == mark


CHOICES = ["cat", "dog", "red car", "bird"]


@pytest.mark.parametrize(
    ("prediction", "reference", "choices", "mark"),
    [
        ("dog", "B", [], 0.0),
        ("B", "B", [], 1.0),
        ("dog", "B", ["", "dog"], 1.0),  # an empty option is in no answer
        ("F", "F", ["u", "v", "w", "x", "y", "z"], 1.0),
        ("F", "F", CHOICES, 0.0),
        ("Yes", "A", ["Yes", "No"], 1.0),
        ("yes.", "A", ["Yes", "No"], 1.0),
        ("Not sure", "B", ["Yes", "No"], 1.0),
    ],
)
def test_choices(prediction: str, reference: str, choices: list[str], mark: float) -> None:
    assert get_metric("mmbench").mark(prediction, [reference], choices) == mark


def row(question_id: object, prediction: str, reference: str, category: str) -> dict[str, object]:
    mark = get_metric("mmbench").mark(prediction, [reference], CHOICES)
    given = {"prediction": prediction, "references": [reference], "choices": CHOICES, "category": category}
    return {**given, "question_id": question_id, "mark": mark}


def test_an_item_counts_when_all_its_rotations_are_right() -> None:
    rows = [row(7, "A", "A", "counting"), row(1000007, "B", "B", "counting"), row("2000007", "C", "C", "counting")]
    rows += [row(8, "A", "A", "colour"), row(1000008, "A", "B", "colour"), row(9, "horse", "A", "colour")]
    assert official_figures(get_metric("mmbench"), rows) == {
        "circular_accuracy": pytest.approx(1 / 3), "accuracy": pytest.approx(4 / 6), "items": 3,
        "unmatched": pytest.approx(1 / 6), "colour/circular_accuracy": 0.0, "counting/circular_accuracy": 1.0,
    }  # fmt: skip
