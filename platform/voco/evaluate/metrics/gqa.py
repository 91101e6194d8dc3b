"""GQA's rule: exact match after light normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from voco.evaluate.metrics import Metric


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction equals one of the references, else 0.0; 0.0 for an empty prediction.

    The rule of LLaVA's GQA converter (scripts/convert_gqa_for_eval.py): lower case, without trailing full stops and the blanks
    around it. Articles, synonyms and number words are not forgiven.
    """
    answer = _normalise(prediction)
    return float(answer != "" and answer in {_normalise(reference) for reference in references})


def _normalise(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


METRIC = Metric(name="gqa", mark=exact_match)
