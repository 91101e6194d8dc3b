"""The PyPI package `easy-vqa`, unchanged: images of one shape each, its questions, and the labels that follow from them.

Nothing is measured from pixels: the package's questions and answers about an image give its shape and color.
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

Label = tuple[str, str]  # (color, shape)


@dataclass(frozen=True)
class ShapeQuestion:
    """One row of the package's questions.json."""

    text: str
    answer: str
    image: int  # the image file is `<image>.png`


def folder(split: str) -> Path:
    """The package's directory of a split, train or test, with `questions.json` and `images/`."""
    return Path(easy_vqa.__file__).parent / "data" / split


def shape_questions(split: str) -> list[ShapeQuestion]:
    """The package's questions of a split, in its order."""
    rows = json.loads((folder(split) / "questions.json").read_text())
    return [ShapeQuestion(text=text, answer=answer, image=image) for text, answer, image in rows]


def labels(questions: list[ShapeQuestion]) -> dict[int, Label]:
    """Labels by image number, for the images whose questions leave one color and one shape possible.

    A "what" question affirms every color and shape in its text and answer. A yes/no question affirms or denies the word in
    its text; "no" or "not" in the text reverses that.
    """
    possible: dict[int, set[str]] = {}
    for question in questions:
        remaining = possible.setdefault(question.image, {*COLORS, *SHAPES})
        words = WORD.findall(question.text)
        if question.answer in ("yes", "no"):
            affirmed = (question.answer == "yes") != bool({"no", "not"} & set(words))
        else:
            affirmed = True
            words.append(question.answer)
        for group in (COLORS, SHAPES):
            named = set(words) & set(group)
            if named:
                remaining -= (set(group) - named) if affirmed else named
    by_image = {}
    for image, remaining in sorted(possible.items()):
        colors, shapes = remaining & set(COLORS), remaining & set(SHAPES)
        if len(colors) == 1 and len(shapes) == 1:
            by_image[image] = (colors.pop(), shapes.pop())
    return by_image
