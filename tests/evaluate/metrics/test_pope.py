"""POPE: cases by hand from LLaVA's reading of an answer, and the published worked example."""

from __future__ import annotations

import pytest

from voco.evaluate.metrics import get_metric, official_figures

CASES = [
    ("yes", "yes", 1.0),
    ("yes", "no", 0.0),
    ("no", "no", 1.0),
    ("no", "yes", 0.0),
    ("Yes", "yes", 1.0),
    ("No", "no", 1.0),
    ("No.", "no", 1.0),
    ("Yes.", "yes", 1.0),
    ("NO", "no", 0.0),  # only No, no and not are read: NO is yes
    ("NO", "yes", 1.0),
    ("Not", "no", 0.0),
    ("not", "no", 1.0),
    ("Nope", "no", 0.0),
    ("none", "no", 0.0),
    ("", "yes", 1.0),  # an empty answer is yes, by the rule
    ("", "no", 0.0),
    ("   ", "yes", 1.0),
    ("No, there is no dog.", "no", 1.0),
    ("No,there is a dog", "no", 0.0),  # without the comma it is the word `Nothere`
    ("Yes, there is no doubt.", "yes", 0.0),  # a `no` anywhere in the first sentence
    ("Yes, there is a dog. No cat.", "yes", 1.0),  # the first sentence only
    ("There is a dog. No.", "no", 0.0),
    ("There is not a dog.", "no", 1.0),
    ("There isn't a dog.", "no", 0.0),
    ("I do not know", "no", 1.0),
    ("I cannot see it", "no", 0.0),
    ("There are no dogs", "no", 1.0),
    ("There are no, dogs", "no", 1.0),
    ("No\nbecause", "no", 0.0),  # a line end parts no words
    ("\nNo", "no", 1.0),  # an answer has no blanks around it
    ("no ", "no", 1.0),
    ("\tno", "no", 1.0),
    ("no!", "no", 0.0),
    ("no?", "no", 0.0),
    ("'no'", "no", 0.0),
    ("No;", "no", 0.0),
    (". no", "no", 0.0),  # the first sentence is empty
    ("3.5 no", "no", 0.0),
    ("yes no", "no", 1.0),
    ("maybe", "yes", 1.0),
    ("unknown", "no", 0.0),
    ("dog", "yes", 1.0),
    ("It is,not", "no", 0.0),
    ("yes", "Yes", 1.0),
    ("no", "No", 1.0),
]


@pytest.mark.parametrize(("prediction", "label", "mark"), CASES)
def test_marks(prediction: str, label: str, mark: float) -> None:
    assert get_metric("pope").mark(prediction, [label]) == mark


def category(name: str, false_positives: int, negatives: int) -> list[dict[str, object]]:
    """1,500 positive questions, of which 1,183 are answered yes, and the negative ones: LLaVA-1.5 7B's counts."""
    answers = [("Yes", "yes")] * 1183 + [("No", "yes")] * 317
    answers += [("Yes", "no")] * false_positives + [("No", "no")] * (negatives - false_positives)
    rows: list[dict[str, object]] = [{"prediction": reply, "references": [label], "category": name} for reply, label in answers]
    return [{**row, "mark": float(reply.lower() == label)} for row, (reply, label) in zip(rows, answers, strict=True)]


def test_the_published_figure_is_the_mean_f1() -> None:
    """LLaVA issue 626: (0.8717759764 + 0.8628738147 + 0.8450000000) / 3; the random part has 2,910 questions."""
    rows = category("random", 31, 1410) + category("popular", 59, 1500) + category("adversarial", 117, 1500)
    figures = official_figures(get_metric("pope"), rows)
    assert figures["f1"] == pytest.approx(0.859883263717447, abs=1e-12)
    assert figures["random/f1"] == pytest.approx(0.8717759764185703, abs=1e-12)
    assert figures["random/accuracy"] == pytest.approx(0.8804123711340206, abs=1e-12)
    assert figures["random/precision"] == pytest.approx(0.9744645799011532, abs=1e-12)
    assert figures["random/recall"] == pytest.approx(0.7886666666666666, abs=1e-12)
    assert figures["random/yes_ratio"] == pytest.approx(1214 / 2910)
    assert figures["popular/f1"] == pytest.approx(0.8628738147337709, abs=1e-12)
    assert figures["adversarial/f1"] == pytest.approx(0.845, abs=1e-12)
    assert figures["accuracy"] == pytest.approx((2562 / 2910 + 2624 / 3000 + 2566 / 3000) / 3)


def test_an_answer_that_is_never_yes_has_no_precision() -> None:
    figures = official_figures(get_metric("pope"), [{"prediction": "no", "references": ["yes"], "mark": 0.0}])
    assert figures == {"f1": 0.0, "accuracy": 0.0, "precision": 0.0, "recall": 0.0, "yes_ratio": 0.0}
