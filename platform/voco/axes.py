"""The axes of a sweep: which values go together, what a trial is called, and the values put into a job."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any


def product(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, the last axis fastest: {dotted key: value} each.

    An axis may be a whole block, e.g. `compression: [{method: voco, tokens: 1}, {method: none, tokens: 1}]`, for
    combinations that are no full product.
    """
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def name(values: Mapping[str, Any]) -> str:
    """What a trial is called: its values joined, fit for a path and a job's name; `voco-4` for method voco, tokens 4."""
    return "-".join(_word(value) for value in values.values())


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "-".join(_word(inner) for inner in value.values())
    return re.sub(r"[^a-z0-9]+", "-", str(value).lower()).strip("-")


def put(job: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a job with each value at its dotted key. Raises KeyError for a path that runs through no mapping."""
    changed: dict[str, Any] = copy.deepcopy(dict(job))
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        place: Any = changed
        for part in path:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise KeyError(f"{dotted}: {'.'.join(path)} is no block")
        place[last] = value
    return changed
