"""ScienceQA as LLaVA marks it; the published figure counts questions with an image only.

Source: Lu et al. 2022 (arXiv 2209.09513) for the set, LLaVA's eval_science_qa.py for how a letter is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, accuracy_figures, mean_mark, ratio

if TYPE_CHECKING:
    from voco.evaluate.metrics import Floats, Sums

LETTERS = "ABCDE"
SENTENCE = re.compile(f"The answer is ([{LETTERS}])")


def read_letter(prediction: str) -> str | None:
    """The letter of an answer: `B`, `B. ...` at its start, or `The answer is B` anywhere; None for any other.

    A line end counts as a full stop and a blank. A full stop alone is not enough: `B.` is no letter.
    """
    answer = prediction.strip().replace("\n", ". ")
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    sentences = SENTENCE.findall(answer)
    with_stop = re.search(SENTENCE.pattern + r"\.", answer)
    return with_stop[1] if with_stop else sentences[0] if sentences else None


def scienceqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the letter that is read is the reference's."""
    return float(read_letter(prediction) in {reference.strip() for reference in references})


def _figures(answers: Sequence[MarkedAnswer]) -> Figures:
    """Accuracy of the questions with an image, where there are any; of all questions, and of each subject."""
    with_image = [answer for answer in answers if answer.get("image")]
    return ({"img_accuracy": mean_mark(with_image)} if with_image else {}) | accuracy_figures(answers)


def _sums(answers: Sequence[MarkedAnswer]) -> Sums:
    """Marks and answers, of questions with an image where there are any."""
    import numpy as np

    counted = np.array([bool(answer.get("image")) for answer in answers])
    counted = counted if counted.any() else np.ones(len(answers), dtype=bool)
    sums = np.stack([counted * np.array([answer["mark"] for answer in answers]), counted], axis=1)

    def share(totals: Floats) -> Floats:
        return ratio(totals[:, 0], totals[:, 1])

    return sums, share


METRIC = Metric(name="scienceqa", mark=scienceqa_accuracy, aggregate=_figures, headline="img_accuracy", sums=_sums)
