"""F1 of the words that prediction and reference share: a part of a mark for a part of the answer. Not the papers' judged figure.

Source: SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1): the best F1 over the references.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, by_category, mean_mark
from voco.evaluate.metrics.exact import NOT_JUDGED, squad_words


def shared_words(prediction: str, references: Sequence[str]) -> float:
    """The best F1 over the references, words counted as often as they occur. 0.0 for a prediction without words."""
    answer = Counter(squad_words(prediction))
    return max((_f1(answer, Counter(squad_words(reference))) for reference in references), default=0.0)


def _f1(answer: Counter[str], reference: Counter[str]) -> float:
    return 2 * (answer & reference).total() / max(1, answer.total() + reference.total())


def _figures(answers: Sequence[MarkedAnswer]) -> Figures:
    """The mean F1 of all answers, and of each category where there are several."""
    groups = by_category(answers)
    categories = {f"{name}/f1": mean_mark(group) for name, group in groups.items()} if len(groups) > 1 else {}
    return {"f1": mean_mark(answers), **categories}


METRIC = Metric(name="token_f1", mark=shared_words, aggregate=_figures, headline="f1", headline_is_mean=True, note=NOT_JUDGED)
