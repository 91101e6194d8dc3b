"""Exact match of short answers, for sets whose papers let a language model judge: MSVD-QA, MSRVTT-QA and ActivityNet-QA.

The answers' form is SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1). The figure is not the papers' judged figure.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache

from voco.evaluate.metrics import Metric

NOT_JUDGED = "not the figure of the papers on MSVD-QA, MSRVTT-QA and ActivityNet-QA, which a language model judges"
ARTICLE = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=1 << 16)
def squad_words(text: str) -> tuple[str, ...]:
    """The words of an answer in lower case, without punctuation and articles."""
    return tuple(ARTICLE.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def same_words(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the words are those of one of the references. 0.0 for a prediction without words."""
    answer = squad_words(prediction)
    return float(answer != () and answer in {squad_words(reference) for reference in references})


METRIC = Metric(name="exact", mark=same_words, note=NOT_JUDGED)
