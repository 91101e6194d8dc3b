"""VQAv2's rule on the answer that LLaVA's converter submits: cases by hand."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric

CASES = [
    ("yes", {"yes": 10}, 1.0),
    ("Yes", {"yes": 10}, 1.0),  # the converter submits `yes`
    ("yes.", {"yes": 10}, 1.0),
    ("Yes", {"Yes": 10}, 0.0),  # and the server compares it with `Yes`
    ("Yes", {"Yes": 9, "no": 1}, 1.0),
    ("NO!", {"no": 10}, 1.0),
    ("", {"yes": 10}, 0.0),
    ("the", {"a": 5, "the": 5}, 0.0),  # submitted as nothing
    ("a", {"a": 10}, 0.0),
    ("no", {"yes": 9, "no": 1}, 0.3),
    ("No", {"yes": 8, "no": 2}, 0.6),
    ("No.", {"yes": 7, "no": 3}, 0.9),
    ("No", {"yes": 6, "no": 4}, 1.0),
    ("Maybe", {"yes": 10}, 0.0),
    ("Two", {"2": 10}, 1.0),
    ("two", {"two": 10}, 0.0),  # submitted as `2`
    ("two", {"two": 9, "3": 1}, 1.0),
    ("2", {"2": 10}, 1.0),
    ("None", {"0": 10}, 1.0),
    ("none", {"none": 10}, 0.0),
    ("eleven", {"eleven": 10}, 1.0),
    ("The dog", {"dog": 10}, 1.0),
    ("the dog", {"the dog": 10}, 0.0),
    ("the dog", {"the dog": 9, "cat": 1}, 1.0),
    ("T-shirt", {"t shirt": 10}, 1.0),
    ("t-shirt", {"t-shirt": 10}, 0.0),
    ("t-shirt", {"t-shirt": 9, "shirt": 1}, 1.0),
    ("Red, blue", {"red blue": 10}, 1.0),
    ("red,blue", {"redblue": 10}, 1.0),
    ("red,blue", {"red,blue": 9, "red": 1}, 0.0),  # `redblue`, and the server makes `red blue` of the annotators' answer
    ("1,000", {"1000": 10}, 1.0),
    ("1,000", {"1,000": 10}, 0.0),
    ("1,000", {"1,000": 9, "10": 1}, 1.0),
    ("3.5", {"3.5": 10}, 1.0),
    ("p.m.", {"pm": 10}, 1.0),
    ("dont", {"don't": 10}, 1.0),
    ("don't", {"don't": 10}, 1.0),
    ("don't", {"dont": 10}, 0.0),
    ("mcdonald's", {"mcdonald's": 10}, 0.0),  # `mcdonald 's`
    ("mcdonald's", {"mcdonald 's": 10}, 1.0),
    ("Black and white", {"black and white": 10}, 1.0),
    ("Tennis racket.", {"tennis racket": 3, "racket": 7}, 0.9),
    ("  On table \n", {"on table": 10}, 1.0),
    ("Unanswerable", {"unanswerable": 8, "yes": 2}, 1.0),
]


@pytest.mark.parametrize(("prediction", "answers", "mark"), CASES)
def test_marks(prediction: str, answers: dict[str, int], mark: float) -> None:
    assert get_metric("vqa_llava").mark(prediction, annotators(answers)) == pytest.approx(mark)


def annotators(answers: dict[str, int]) -> list[str]:
    return [answer for answer, count in answers.items() for _ in range(count)]
