"""POPE: does the model see objects that are not there? Yes or no questions in three categories.

Source: Li et al. 2023 (arXiv 2305.10355) for the figures, LLaVA's eval_pope.py for how an answer is read. The published figure is
the mean F1 of the categories (LLaVA issue 626: 0.8599 for LLaVA-1.5 7B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, by_category

if TYPE_CHECKING:
    from voco.evaluate.metrics import Floats, Sums

NEGATIONS = {"No", "not", "no"}


def says_yes(prediction: str) -> bool:
    """LLaVA's reading: an answer is `no` if its first sentence, without commas, has the word No, not or no; else `yes`.

    So an empty answer, `NO` and `Nope` are `yes`.
    """
    sentence = prediction.strip().split(".")[0].replace(",", "")
    return not NEGATIONS & set(sentence.split(" "))


def pope_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the answer says what the label says. A label other than `no` is `yes`."""
    return float(bool(references) and says_yes(prediction) == _is_yes(references))


def _is_yes(references: Sequence[str]) -> bool:
    return references[0].strip().lower() != "no"


def _figures(answers: Sequence[MarkedAnswer]) -> Figures:
    """The figures of each category, and before them their means, of which f1 is the published one."""
    categories = {name: _binary(group) for name, group in by_category(answers).items()}
    figures = {key: sum(values[key] for values in categories.values()) / len(categories) for key in _binary(answers)}
    if len(categories) > 1:
        figures |= {f"{name}/{key}": value for name, values in categories.items() for key, value in values.items()}
    return figures


def _binary(answers: Sequence[MarkedAnswer]) -> Figures:
    """Figures of one category, where yes is positive; 0 where a ratio has no divisor."""
    replies = [says_yes(answer["prediction"]) for answer in answers]
    labels = [_is_yes(answer["references"]) for answer in answers]
    hits = sum(claim and label for claim, label in zip(replies, labels, strict=True))
    precision, recall = hits / max(1, sum(replies)), hits / max(1, sum(labels))
    return {
        "f1": 2 * hits / max(1, sum(replies) + sum(labels)),
        "accuracy": sum(claim == label for claim, label in zip(replies, labels, strict=True)) / len(answers),
        "precision": precision,
        "recall": recall,
        "yes_ratio": sum(replies) / len(answers),
    }


def _sums(answers: Sequence[MarkedAnswer]) -> Sums:
    """Of each category: twice the hits, claims of yes and labels of yes, and answers. The mean is over those with answers."""
    import numpy as np

    names = [answer.get("category") or "none" for answer in answers]
    categories = sorted(set(names))
    sums = np.zeros((len(answers), len(categories), 3))
    for row, (name, answer) in enumerate(zip(names, answers, strict=True)):
        claim, label = says_yes(answer["prediction"]), _is_yes(answer["references"])
        sums[row, categories.index(name)] = 2 * (claim and label), claim + label, 1

    def mean_f1(totals: Floats) -> Floats:
        hits, yes, count = np.moveaxis(totals.reshape(-1, len(categories), 3), 2, 0)  # each (R, C)
        present = count > 0
        f1: Floats = np.where(present, hits / np.maximum(1, yes), 0.0)
        return np.asarray(f1.sum(axis=1) / present.sum(axis=1))

    return sums.reshape(len(answers), -1), mean_f1


METRIC = Metric(name="pope", mark=pope_accuracy, aggregate=_figures, headline="f1", sums=_sums)
