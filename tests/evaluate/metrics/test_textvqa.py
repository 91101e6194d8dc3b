"""TextVQA's soft accuracy: cases by hand from the published rule."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric

CASES = [
    ("yes", {"yes": 10}, 1.0),
    ("Yes", {"yes": 10}, 1.0),  # always normalised
    ("yes.", {"yes": 10}, 1.0),
    ("YES!", {"yes": 10}, 1.0),
    ("yes", {"Yes.": 10}, 1.0),
    ("", {"yes": 10}, 0.0),
    (" \t", {"": 5, "yes": 5}, 0.0),
    ("no", {"yes": 9, "no": 1}, 0.3),
    ("no", {"yes": 8, "no": 2}, 0.6),
    ("no", {"yes": 7, "no": 3}, 0.9),
    ("no", {"yes": 6, "no": 4}, 1.0),
    ("maybe", {"yes": 10}, 0.0),
    ("No", {"no": 1, "NO": 1, "no.": 1, "none": 7}, 0.9),
    ("two", {"2": 10}, 1.0),
    ("2", {"two": 10}, 1.0),
    ("none", {"0": 10}, 1.0),
    ("eleven", {"11": 10}, 0.0),
    ("the dog", {"dog": 10}, 1.0),
    ("an old man", {"old man": 3, "man": 7}, 0.9),
    ("coca-cola", {"coca cola": 10}, 1.0),
    ("coca cola", {"coca-cola": 10}, 1.0),
    ("coca - cola", {"coca cola": 10}, 1.0),
    ("cocacola", {"coca-cola": 10}, 0.0),
    ("mcdonald's", {"mcdonald's": 10}, 1.0),
    ("mcdonald's", {"mcdonald 's": 10}, 1.0),  # 's becomes a word
    ("what's", {"whats": 10}, 0.0),  # `what 's`, but the table makes whats `what's`
    ("dont walk", {"don't walk": 10}, 1.0),
    ("1,000", {"1000": 10}, 1.0),
    ("1000", {"1,000": 10}, 1.0),
    ("red,blue", {"redblue": 10}, 1.0),  # commas are deleted before the rule for marks
    ("red,blue", {"red blue": 10}, 0.0),
    ("red, blue", {"red blue": 10}, 1.0),
    ("really?", {"really": 10}, 1.0),
    ("9?5", {"95": 2, "9 5": 8}, 0.6),
    ("3.5", {"3.5": 10}, 1.0),
    ("3.50", {"3.5": 10}, 0.0),
    ("p.m.", {"pm": 10}, 1.0),
    ("www.site.com", {"wwwsitecom": 10}, 1.0),
    ("12:30", {"12:30": 10}, 1.0),
    ("12.30", {"12:30": 10}, 0.0),
    ("STOP", {"stop": 3, "go": 7}, 0.9),
    ("line one\nline two", {"line 1 line 2": 10}, 1.0),
    ("tab\tword", {"tab word": 10}, 1.0),
    ("<new>", {"new": 10}, 1.0),
    ("a@b", {"b": 10}, 1.0),  # `a b`, and `a` is an article
    ("50%", {"50": 10}, 0.0),
    ("7-up", {"7 up": 4, "7up": 6}, 1.0),
    ("x=3", {"x 3": 1, "3": 9}, 0.3),
    ("dell", {"dell": 1}, 1.0),
]


@pytest.mark.parametrize(("prediction", "answers", "mark"), CASES)
def test_marks(prediction: str, answers: dict[str, int], mark: float) -> None:
    assert get_metric("textvqa").mark(prediction, annotators(answers)) == pytest.approx(mark)


def annotators(answers: dict[str, int]) -> list[str]:
    return [answer for answer, count in answers.items() for _ in range(count)]
