"""Benchmark metrics, one file each, which ends in `METRIC = Metric(...)`. `job/tables.py` has a row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from voco.job.tables import METRICS

DEFAULT_METRIC = "gqa"


@dataclass(frozen=True)
class Metric:
    """How an answer is marked: `mark(prediction, references)` is 0.0 for a wrong one to 1.0 for a right one."""

    name: str
    mark: Callable[[str, Sequence[str]], float]


def get_metric(name: str) -> Metric:
    """The metric of a row of `METRICS`. Raises Refused for a name without a row."""
    return METRICS.implementation(name, __name__, "METRIC", Metric)
