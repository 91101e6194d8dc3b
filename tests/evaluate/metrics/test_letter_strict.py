"""LLaVA's strict letter rule: cases by hand."""

from __future__ import annotations

import pytest
from evaluate.metrics.letter_cases import CASES

from voco.evaluate.metrics import get_metric


@pytest.mark.parametrize(("prediction", "reference", "mark"), CASES)
def test_marks(prediction: str, reference: str, mark: float) -> None:
    assert get_metric("letter_strict").mark(prediction, [reference]) == mark
