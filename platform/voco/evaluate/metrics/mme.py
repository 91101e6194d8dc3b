"""MME: two yes or no questions about each image, in fourteen subtasks.

Source: Fu et al. 2023 (arXiv 2306.13394), section 2, and the reading of an answer in the authors' eval_tool. Accuracy counts
questions, accuracy+ counts images of which both questions are right, both in percent. Their sum, at most 200, is a subtask's
score. The published figure is perception, the sum of ten subtasks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from voco.errors import Refused
from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, by_category, mean_mark, ratio

if TYPE_CHECKING:
    from voco.evaluate.metrics import Floats, Sums

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PREFIX = 4  # characters of an answer in which yes or no must be


def read_yes_no(prediction: str) -> str:
    """`yes`, `no`, or `other`: the authors look for yes, then for no, in the first four characters in lower case.

    So `Yes, it is` is yes, `not` and `know` are no, and `y` and `The answer is yes` are other, which is always wrong.
    """
    start = prediction.strip().lower()[:PREFIX]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the answer says what the reference says."""
    return float(read_yes_no(prediction) in {reference.strip().lower().rstrip(".") for reference in references})


def _figures(answers: Sequence[MarkedAnswer]) -> Figures:
    """The sums over subtasks, with how many subtasks are in each, and the figures of each subtask.

    Raises Refused for a category that is no subtask, and for an image that has not two questions.
    """
    groups = by_category(answers)
    subtasks = {name.lower(): name for name in (*PERCEPTION, *COGNITION)}
    unknown = [name for name in groups if name.lower() not in subtasks]
    if unknown:
        raise Refused(f"mme: category: expected one of {', '.join(subtasks.values())}, got {unknown[0]!r}")
    rows = {subtasks[name.lower()]: _subtask(name, group) for name, group in groups.items()}
    figures: Figures = {}
    for part, members in {"perception": PERCEPTION, "cognition": COGNITION}.items():
        present = [name for name in members if name in rows]
        if present:
            figures |= {part: sum(rows[name]["score"] for name in present), f"{part}_subtasks": len(present)}
    ordered = [name for name in subtasks.values() if name in rows]
    return figures | {f"{name}/{key}": value for name in ordered for key, value in rows[name].items()}


def _subtask(name: str, answers: Sequence[MarkedAnswer]) -> Figures:
    pairs = _pairs(name, answers)
    both = sum(answers[first]["mark"] and answers[second]["mark"] for first, second in pairs)
    accuracy, plus = 100 * mean_mark(answers), 100 * both / len(pairs)
    return {"score": accuracy + plus, "accuracy": accuracy, "accuracy_plus": plus}


def _pairs(name: str, answers: Sequence[MarkedAnswer]) -> list[list[int]]:
    """Where the two answers about each image are. An image is known by its question id, which both share, or by its file."""
    keys: list[Callable[[MarkedAnswer], Hashable]] = [
        lambda answer: (answer.get("image"), answer.get("question_id")),
        lambda answer: answer.get("question_id"),
        lambda answer: answer.get("image"),
    ]
    for key in keys:
        images: dict[Hashable, list[int]] = {}
        for position, answer in enumerate(answers):
            images.setdefault(key(answer), []).append(position)
        if all(len(pair) == 2 for pair in images.values()):
            return list(images.values())
    image, about = next((image, about) for image, about in images.items() if len(about) != 2)
    got = f"{len(about)} about {image}" if image else f"{len(about)} without the image"
    raise Refused(f"mme: {name}: expected two questions with the same image or question_id, got {got}")


def _pairs_of_set(answers: Sequence[MarkedAnswer]) -> dict[tuple[str, int], list[int]]:
    """Where both answers about each image are in the set, by subtask in small letters and number of the pair."""
    rows: dict[str, list[int]] = {}
    for position, answer in enumerate(answers):
        rows.setdefault((answer.get("category") or "none").lower(), []).append(position)
    return {
        (name, number): [positions[index] for index in pair]
        for name, positions in rows.items()
        for number, pair in enumerate(_pairs(name, [answers[position] for position in positions]))
    }


def _groups(answers: Sequence[MarkedAnswer]) -> list[tuple[str, int]]:
    """The pair of each answer."""
    label = {position: pair for pair, positions in _pairs_of_set(answers).items() for position in positions}
    return [label[position] for position in range(len(answers))]


def _sums(answers: Sequence[MarkedAnswer]) -> Sums:
    """Of each subtask of the published part: marks, answers, and of pairs the right ones and all. One without any counts 0."""
    import numpy as np

    pairs = _pairs_of_set(answers)
    parts = [[name.lower() for name in part] for part in (PERCEPTION, COGNITION)]
    present = {name for name, _ in pairs}
    subtasks = next(part for part in parts if present & set(part))
    sums = np.zeros((len(answers), len(subtasks), 4))
    for (name, _), positions in pairs.items():
        if name in subtasks:
            marks = [answers[position]["mark"] for position in positions]
            for position, mark in zip(positions, marks, strict=True):
                sums[position, subtasks.index(name), :2] = mark, 1
            sums[positions[0], subtasks.index(name), 2:] = all(marks), 1

    def part_sum(totals: Floats) -> Floats:
        right, questions, both, images = np.moveaxis(totals.reshape(-1, len(subtasks), 4), 2, 0)  # each (R, subtasks)
        total = np.nansum(100 * ratio(right, questions) + 100 * ratio(both, images), axis=1)
        return np.where(questions.sum(axis=1) > 0, total, np.nan)

    return sums.reshape(len(answers), -1), part_sum


METRIC = Metric(
    name="mme",
    mark=mme_accuracy,
    aggregate=_figures,
    headline="perception",
    sums=_sums,
    groups=_groups,
    needs=("category",),
)
