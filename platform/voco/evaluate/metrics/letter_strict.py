"""An option's letter and nothing else, as LLaVA's scripts want it (convert_seed_for_submission.py)."""

from __future__ import annotations

from collections.abc import Sequence

from voco.evaluate.metrics import Metric


def strict_letter(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the answer, without blanks around it, is the letter: `B`, and not `b`, `B.` or `(B)`."""
    answer = prediction.strip()
    return float(answer != "" and answer in {reference.strip() for reference in references})


METRIC = Metric(name="letter_strict", mark=strict_letter)
