"""VQAv2's soft accuracy: cases by hand from the published rule, and the figures of a set."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric, official_figures

CASES = [
    ("yes", {"yes": 10}, 1.0),
    ("Yes", {"yes": 10}, 0.0),  # all agree: as it is written
    ("Yes", {"yes": 9, "no": 1}, 1.0),  # they differ: normalised
    ("yes.", {"yes": 10}, 0.0),
    ("yes.", {"yes": 9, "no": 1}, 1.0),
    (" yes\n", {"yes": 10}, 1.0),  # blanks and line ends around it are no part of an answer
    ("no", {"yes": 9, "no": 1}, 0.3),
    ("no", {"yes": 8, "no": 2}, 0.6),
    ("no", {"yes": 7, "no": 3}, 0.9),
    ("no", {"yes": 6, "no": 4}, 1.0),
    ("no", {"yes": 5, "no": 5}, 1.0),
    ("maybe", {"yes": 5, "no": 5}, 0.0),
    ("", {"yes": 10}, 0.0),
    ("  \n", {"yes": 5, "?": 5}, 0.0),  # an empty answer is wrong, also where `?` normalises to nothing
    ("two", {"2": 6, "3": 4}, 1.0),
    ("2", {"two": 6, "3": 4}, 1.0),
    ("two", {"2": 10}, 0.0),
    ("none", {"0": 5, "1": 5}, 1.0),
    ("ten", {"10": 3, "11": 7}, 0.9),
    ("eleven", {"11": 5, "10": 5}, 0.0),  # number words end at ten
    ("one two", {"1 2": 2, "12": 8}, 0.6),
    ("the dog", {"dog": 5, "cat": 5}, 1.0),
    ("a red car", {"red car": 2, "car": 8}, 0.6),
    ("an apple, the pear", {"apple pear": 4, "pear": 6}, 1.0),  # the comma touches a blank: deleted
    ("red,blue", {"red blue": 4, "red": 6}, 1.0),  # it touches none: a blank
    ("red,blue", {"redblue": 4, "red": 6}, 0.0),
    ("red/white", {"red white": 3, "red": 7}, 0.9),
    ("red / white", {"red white": 3, "red": 7}, 0.9),
    ("red /white-hot", {"red white hot": 1, "red": 9}, 0.3),  # each mark by itself
    ("t-shirt", {"t shirt": 5, "shirt": 5}, 1.0),
    ("t-shirt", {"t-shirt": 5, "shirt": 5}, 1.0),  # the annotators' answers are normalised too
    ("t-shirt", {"tshirt": 5, "shirt": 5}, 0.0),
    ("1,000", {"1000": 5, "10": 5}, 1.0),
    ("1,000/2", {"10002": 1, "1000 2": 9}, 0.3),  # a comma between digits deletes every mark
    ("3.5", {"3.5": 5, "35": 5}, 1.0),
    ("3.5", {"35": 10}, 0.0),
    ("p.m.", {"pm": 5, "am": 5}, 1.0),
    ("3 p.m", {"3 pm": 2, "3": 8}, 0.6),
    ("5.", {"5": 1, "6": 9}, 0.3),
    ("v.2", {"v2": 9, "v.2": 1}, 0.3),  # a full stop before a digit stays
    ("dont", {"don't": 4, "do": 6}, 1.0),
    ("don't", {"dont": 4, "do": 6}, 1.0),
    ("whats up", {"what's up": 3, "up": 7}, 0.9),
    ("5 oclock", {"5 o'clock": 9, "5": 1}, 1.0),
    ("oclock", {"o'clock": 10}, 0.0),
    ("im here", {"i'm here": 5, "here": 5}, 0.0),  # the table has `Im`, and words are in lower case by then
    ("somebody'd", {"somebodyd": 5, "they": 5}, 1.0),  # the one entry of the table that is the wrong way round
    ("couldntve", {"couldn't've": 5, "could": 5}, 0.0),  # needs one of its apostrophes
    ("couldn'tve", {"couldnt've": 5, "could": 5}, 1.0),
    ("YES!", {"yes": 5, "no": 5}, 1.0),
    ('"stop"', {"stop": 5, "go": 5}, 1.0),
    ("(left)", {"left": 1, "right": 9}, 0.3),
    ("black & white", {"black & white": 5, "black": 5}, 1.0),  # & is not in the list of marks
    ("$5", {"5": 9, "$5": 1}, 0.3),
    ("5:30", {"5:30": 4, "530": 6}, 1.0),
    ("it's", {"its": 5, "it": 5}, 0.0),  # its is a word
    ("The", {"a": 5, "the": 5}, 1.0),  # by the rule: both are nothing
    ("cat", {"cat": 1}, 1.0),  # one reference: there is none to leave out
    ("dog", {"cat": 1}, 0.0),
    ("cat", {"cat": 2}, 0.3333333333333333),
]


@pytest.mark.parametrize(("prediction", "answers", "mark"), CASES)
def test_marks(prediction: str, answers: dict[str, int], mark: float) -> None:
    assert get_metric("vqa").mark(prediction, annotators(answers)) == pytest.approx(mark)


def annotators(answers: dict[str, int]) -> list[str]:
    return [answer for answer, count in answers.items() for _ in range(count)]


def test_the_set_has_both_figures_and_each_answer_type() -> None:
    """LLaVA's converter makes `Yes` the `yes` on which all annotators agree."""
    rows = [
        {"prediction": "Yes", "references": ["yes"] * 10, "mark": 0.0, "category": "yes/no"},
        {"prediction": "two", "references": ["2"] * 9 + ["3"], "mark": 1.0, "category": "number"},
    ]
    figures = {"accuracy": 0.5, "accuracy_llava": 1.0, "number/accuracy": 1.0, "yes/no/accuracy": 0.0}
    assert official_figures(get_metric("vqa"), rows) == figures
