"""MMBench: multiple choice in CircularEval, where an item counts only if it is right under every rotation of its options.

Source: Liu et al. 2023 (arXiv 2307.06281), section 4.1 for CircularEval and for how an answer is matched to an option. Answers
that no rule matches go to ChatGPT there, and are wrong here; `unmatched` is their share.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, accuracy_figures, by_category, mean_mark, ratio

if TYPE_CHECKING:
    from voco.evaluate.metrics import Floats, Sums

ROTATION = 1_000_000  # a rotation's index is the item's plus a multiple of this
LONGEST_WITH_ARTICLE = 3  # words of an answer in which `A` is the letter, not the article
# what may surround an option's letter, tried in this order
FORMS = (
    ("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","), (":", "."),
    (":", ")"), (":", ")."),
)  # fmt: skip
FEWEST_LETTERS = 5  # A to E are letters even if there are fewer options


def match_option(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that an answer chooses, or None.

    A letter: a word of the answer in one of FORMS, if no other letter is in that form. Otherwise an option's text: the only
    option that is in the answer, without regard to case.
    """
    return _letter(prediction, max(FEWEST_LETTERS, len(choices))) or _option_text(prediction, choices)


def _letter(prediction: str, count: int) -> str | None:
    words = prediction.split()
    for before, after in FORMS:
        letters = [letter for letter in string.ascii_uppercase[:count] if before + letter + after in words]
        article = (before, after) == ("", "") and "A" in words and len(words) > LONGEST_WITH_ARTICLE
        if len(letters) == 1 and not article:
            return letters[0]
    return None


def _option_text(prediction: str, choices: Sequence[str]) -> str | None:
    answer = prediction.lower()
    inside = [
        letter for letter, choice in zip(string.ascii_uppercase, choices, strict=False) if choice and choice.lower() in answer
    ]
    return inside[0] if len(inside) == 1 else None


def option_accuracy(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1.0 when the answer is matched to the reference's letter."""
    return float(match_option(prediction, choices) in {reference.strip().upper() for reference in references})


def _figures(answers: Sequence[MarkedAnswer]) -> Figures:
    """Circular accuracy of items, of all and of each category, and the accuracy of single questions."""
    items: dict[str, list[MarkedAnswer]] = {}
    for answer in answers:
        items.setdefault(_item(answer["question_id"]), []).append(answer)
    circular = [{**rotations[0], "mark": float(all(row["mark"] for row in rotations))} for rotations in items.values()]
    unmatched = sum(match_option(answer["prediction"], answer.get("choices") or ()) is None for answer in answers)
    categories = by_category(circular) if len(by_category(circular)) > 1 else {}
    return {
        "circular_accuracy": mean_mark(circular),
        "accuracy": accuracy_figures(answers)["accuracy"],
        "items": len(items),
        "unmatched": unmatched / len(answers),
        **{f"{name}/circular_accuracy": mean_mark(group) for name, group in categories.items()},
    }


def _item(question_id: str | int) -> str:
    """The item of which a question is a rotation."""
    text = str(question_id)
    return str(int(text) % ROTATION) if text.isdecimal() else text


def _groups(answers: Sequence[MarkedAnswer]) -> list[str]:
    """The item of each answer."""
    return [_item(answer["question_id"]) for answer in answers]


def _sums(answers: Sequence[MarkedAnswer]) -> Sums:
    """Items that are right under every rotation, and items; both stand in the row of the item's first answer."""
    import numpy as np

    items: dict[str, list[int]] = {}
    for position, item in enumerate(_groups(answers)):
        items.setdefault(item, []).append(position)
    sums = np.zeros((len(answers), 2))
    for positions in items.values():
        sums[positions[0]] = all(answers[position]["mark"] for position in positions), 1

    def share(totals: Floats) -> Floats:
        return ratio(totals[:, 0], totals[:, 1])

    return sums, share


METRIC = Metric(
    name="mmbench",
    mark=option_accuracy,
    aggregate=_figures,
    headline="circular_accuracy",
    sums=_sums,
    groups=_groups,
    reads_choices=True,
    needs=("question_id",),
    note="answers that match no option by letter or text are wrong here; the authors ask ChatGPT about them",
)
