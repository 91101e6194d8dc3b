"""An option's letter at the start of any answer, as lmms-eval reads SEED-Bench: figures under it are higher than LLaVA's."""

from __future__ import annotations

from collections.abc import Sequence

from voco.evaluate.metrics import Metric


def lenient_letter(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the first character is the letter, in either case: `B`, `b.`, `B) a dog`, but also `both`."""
    answer = prediction.strip()[:1].lower()
    return float(answer != "" and answer in {reference.strip().lower() for reference in references})


METRIC = Metric(name="letter_lenient", mark=lenient_letter)
