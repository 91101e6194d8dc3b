"""MME: cases by hand from the authors' reading of an answer, and its sums over subtasks."""

from __future__ import annotations

import pytest

from voco.errors import Refused
from voco.evaluate.metrics import get_metric, mme, official_figures

CASES = [
    ("Yes", "Yes", 1.0),
    ("yes", "Yes", 1.0),
    ("YES", "yes", 1.0),
    ("No", "Yes", 0.0),
    ("No", "No", 1.0),
    ("no", "no", 1.0),
    ("Yes", "No", 0.0),
    ("Yes.", "Yes", 1.0),
    ("No.", "No", 1.0),
    ("Yes, there is.", "Yes", 1.0),
    ("No, it isn't", "No", 1.0),
    ("Yes", "Yes.", 1.0),
    ("", "Yes", 0.0),
    ("", "No", 0.0),
    ("  ", "No", 0.0),
    ("y", "Yes", 0.0),  # the authors' tool reads words, not letters
    ("n", "No", 0.0),
    ("ye", "Yes", 0.0),
    ("yess", "Yes", 1.0),
    ("(yes", "Yes", 1.0),
    ("(yes)", "Yes", 1.0),  # within the first four characters
    ("((yes))", "Yes", 0.0),
    (" yes", "Yes", 1.0),
    ("\nno", "No", 1.0),
    ("'no'", "No", 1.0),
    ('"No"', "No", 1.0),
    ("** no", "No", 0.0),
    ("not", "No", 1.0),  # `no` is in it
    ("nothing", "No", 1.0),
    ("know", "No", 1.0),  # and in `know`
    ("unknown", "No", 0.0),
    ("I do not know", "No", 0.0),
    ("The answer is yes", "Yes", 0.0),
    ("A: no", "No", 0.0),
    ("A:no", "No", 1.0),
    ("Noyes", "No", 1.0),
    ("noye", "Yes", 0.0),
    ("eyes", "Yes", 1.0),  # `yes` is looked for first
    ("eyes", "No", 0.0),
    ("snow", "No", 1.0),
    ("maybe", "Yes", 0.0),
    ("other", "Yes", 0.0),
    ("true", "Yes", 0.0),
    ("1", "Yes", 0.0),
    ("YES!!!", "Yes", 1.0),
]


@pytest.mark.parametrize(("prediction", "reference", "mark"), CASES)
def test_marks(prediction: str, reference: str, mark: float) -> None:
    assert get_metric("mme").mark(prediction, [reference]) == mark


def pair(category: str, image: str | None, first: float, second: float, **keys: object) -> list[dict[str, object]]:
    """The two questions about an image."""
    common = {"category": category, "image": image, "prediction": "Yes", "references": ["Yes"], **keys}
    return [{**common, "mark": first}, {**common, "mark": second}]


def test_accuracy_plus_counts_images_of_which_both_are_right() -> None:
    """existence: 3 of 4 questions and 1 of 2 images, 75 + 50. color: 2 of 4 and none, 50 + 0. code_reasoning: all."""
    rows = pair("existence", "a", 1, 1) + pair("existence", "b", 1, 0) + pair("color", "a", 1, 0) + pair("color", "b", 0, 1)
    figures = official_figures(get_metric("mme"), rows + pair("code_reasoning", "a", 1, 1))
    assert figures == {
        "perception": 175.0, "perception_subtasks": 2, "cognition": 200.0, "cognition_subtasks": 1,
        "existence/score": 125.0, "existence/accuracy": 75.0, "existence/accuracy_plus": 50.0,
        "color/score": 50.0, "color/accuracy": 50.0, "color/accuracy_plus": 0.0,
        "code_reasoning/score": 200.0, "code_reasoning/accuracy": 100.0, "code_reasoning/accuracy_plus": 100.0,
    }  # fmt: skip


def test_everything_right_is_2800_points() -> None:
    names = [*mme.PERCEPTION, *mme.COGNITION]
    figures = official_figures(get_metric("mme"), [row for name in names for row in pair(name, "a", 1, 1)])
    assert (figures["perception"], figures["cognition"]) == (2000.0, 800.0)
    assert (figures["perception_subtasks"], figures["cognition_subtasks"]) == (10, 4)


def test_a_pair_is_known_by_its_id_or_by_its_file() -> None:
    """Two images with equal bytes have one file name in samples/, and different ids."""
    by_id = pair("OCR", "same.jpg", 1, 1, question_id="OCR/1.jpg") + pair("OCR", "same.jpg", 0, 1, question_id="OCR/2.jpg")
    assert official_figures(get_metric("mme"), by_id)["OCR/accuracy_plus"] == 50.0
    rows = [{**row, "question_id": number} for number, row in enumerate(pair("OCR", "a", 1, 1) + pair("OCR", "b", 0, 0))]
    assert official_figures(get_metric("mme"), rows)["OCR/score"] == 100.0


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (pair("OCR", "a", 1, 1)[:1], "mme: OCR: expected two questions with the same image or question_id, got 1 about a"),
        (
            pair("OCR", None, 1, 1) * 2,
            "mme: OCR: expected two questions with the same image or question_id, got 4 without the image",
        ),
        (pair("chess", "a", 1, 1), "mme: category: expected one of existence, count, position, .*, got 'chess'"),
    ],
)
def test_a_set_that_is_not_mme_is_refused(rows: list[dict[str, object]], line: str) -> None:
    with pytest.raises(Refused, match=line):
        official_figures(get_metric("mme"), rows)
