"""GQA's rule: exact match after light normalisation."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction equals one of the references, else 0.0.

    The rule of LLaVA's GQA converter (scripts/convert_gqa_for_eval.py): lower case, trailing full stops off, and
    blanks around it; no articles, synonyms or number words are forgiven.
    """
    return float(_plain(prediction) in {_plain(reference) for reference in references})


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
