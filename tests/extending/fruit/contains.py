"""A metric: an answer is right when it contains a reference."""

from __future__ import annotations

from collections.abc import Sequence

from voco.evaluate.metrics import Metric


def mark(prediction: str, references: Sequence[str]) -> float:
    return float(any(reference.lower() in prediction.lower() for reference in references))


METRIC = Metric("contains", mark)
