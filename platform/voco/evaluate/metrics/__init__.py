"""Benchmark metrics, one file a rule, which ends in `METRIC`. Its row in `job/tables.py` makes its name an `evaluate.metric`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from voco.job.tables import METRICS

DEFAULT_METRIC = "gqa"


@dataclass(frozen=True)
class Metric:
    """How an answer is marked: `mark(prediction, references)` is 0.0 for a wrong one to 1.0 for a right one."""

    name: str
    mark: Callable[[str, Sequence[str]], float]


def get_metric(name: str) -> Metric:
    """The metric of a row of `METRICS`. Raises KeyError for a name without a row."""
    metric: Metric = import_module(METRICS[name].module or f"{__name__}.{name}").METRIC
    return metric
