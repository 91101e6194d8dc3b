"""The PyPI package `easy-vqa` as it is: images of one shape each, and what its own questions say about them.

Nothing is measured from pixels: an image's shape and color follow from the package's questions and answers about it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import easy_vqa

COLORS = ("black", "gray", "red", "blue", "yellow", "green", "teal", "brown")
SHAPES = ("circle", "rectangle", "triangle")
WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class ShapeQuestion:
    """One row of the package's questions.json."""

    text: str
    answer: str
    image: int  # the image file is `<image>.png`


def folder(split: str) -> Path:
    """The package's data of one split, train or test: `questions.json` and `images/`."""
    return Path(easy_vqa.__file__).parent / "data" / split


def shape_questions(split: str) -> list[ShapeQuestion]:
    rows = json.loads((folder(split) / "questions.json").read_text())
    return [ShapeQuestion(text=text, answer=answer, image=image) for text, answer, image in rows]


def labels(asked: list[ShapeQuestion]) -> dict[int, tuple[str, str]]:
    """Image to (color, shape), for the images whose questions leave one of each possible.

    A "what" question states every color and shape in its text and its answer; a yes/no question states its word or
    denies it, and "no" or "not" in the text turns that round.
    """
    possible: dict[int, set[str]] = {}
    for question in asked:
        left = possible.setdefault(question.image, {*COLORS, *SHAPES})
        words = WORD.findall(question.text)
        if question.answer in ("yes", "no"):
            stated = (question.answer == "yes") != bool({"no", "not"} & set(words))
        else:
            stated = True
            words.append(question.answer)
        for group in (COLORS, SHAPES):
            named = set(words) & set(group)
            if named:
                left -= (set(group) - named) if stated else named
    found = {}
    for image, left in sorted(possible.items()):
        colors, shapes = left & set(COLORS), left & set(SHAPES)
        if len(colors) == 1 and len(shapes) == 1:
            found[image] = (colors.pop(), shapes.pop())
    return found
