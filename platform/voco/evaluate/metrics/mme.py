"""MME: two yes or no questions about each image, in fourteen subtasks.

Source: Fu et al. 2023 (arXiv 2306.13394), section 2, and the reading of an answer in the authors' eval_tool. Accuracy counts
questions, accuracy+ counts images of which both questions are right, both in percent. Their sum, at most 200, is a subtask's
score. The published figure is perception, the sum of ten subtasks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from voco.errors import Refused
from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, by_category, mean_mark

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
    accuracy, plus = 100 * mean_mark(answers), 100 * sum(all(pair) for pair in pairs) / len(pairs)
    return {"score": accuracy + plus, "accuracy": accuracy, "accuracy_plus": plus}


def _pairs(name: str, answers: Sequence[MarkedAnswer]) -> list[list[float]]:
    """The two marks of each image. An image is known by its question id, which both questions share, or by its file."""
    keys: list[Callable[[MarkedAnswer], Hashable]] = [
        lambda answer: (answer.get("image"), answer.get("question_id")),
        lambda answer: answer.get("question_id"),
        lambda answer: answer.get("image"),
    ]
    for key in keys:
        images: dict[Hashable, list[float]] = {}
        for answer in answers:
            images.setdefault(key(answer), []).append(answer["mark"])
        if all(len(marks) == 2 for marks in images.values()):
            return list(images.values())
    image, marks = next((image, marks) for image, marks in images.items() if len(marks) != 2)
    got = f"{len(marks)} about {image}" if image else f"{len(marks)} without the image"
    raise Refused(f"mme: {name}: expected two questions with the same image or question_id, got {got}")


METRIC = Metric(name="mme", mark=mme_accuracy, aggregate=_figures, headline="perception", needs=("category",))
