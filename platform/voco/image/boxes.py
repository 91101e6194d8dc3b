"""Boxes as LLaVA writes them: corners as shares of the side of the image padded to a square, `[0.28, 0.34, 0.4, 0.71]`."""

from __future__ import annotations

import re

Box = tuple[float, float, float, float]  # x and y of the upper left corner, then of the lower right one

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_BOX = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
DECIMALS = 2  # of the boxes in LLaVA's mix


def square_box(corners: Box, width: int, height: int) -> Box:
    """Corners in pixels of an image as shares of the side of its padded square. LLaVA pads with the image in the middle.

    The two bands of the shorter axis differ by at most one pixel: the first one is rounded down, as `expand2square` does.
    """
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x0, y0, x1, y1 = corners
    return (x0 + left) / side, (y0 + top) / side, (x1 + left) / side, (y1 + top) / side


def box_text(box: Box, decimals: int = DECIMALS) -> str:
    """The box as LLaVA's data spells it: a Python list of rounded numbers, `0.4` and not `0.40`."""
    return str([round(value, decimals) + 0.0 for value in box])  # + 0.0: no -0.0


def parse_box(text: str) -> Box | None:
    """The first box of a text, four numbers in square brackets, or None. Its corners may be in any order."""
    match = _BOX.search(text)
    if match is None:
        return None
    x0, y0, x1, y1 = (float(value) for value in match.groups())
    return x0, y0, x1, y1


def is_box(text: str) -> bool:
    """True for a box and nothing else, but for spaces and a full stop."""
    return _BOX.fullmatch(text.strip().removesuffix(".")) is not None


def intersection_over_union(first: Box, second: Box) -> float:
    """0.0 for boxes that share no area, and for a box whose second corner is not to the lower right of the first."""
    if not (_area(first) > 0 and _area(second) > 0):
        return 0.0
    shared = _area((max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3])))
    return shared / (_area(first) + _area(second) - shared)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
