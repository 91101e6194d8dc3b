"""Eight questions about a 2x2 scene, none of which follows from the others.

**The rule.** Take any seven of a scene's questions with their answers, and what their texts presuppose ("the red circle":
there is exactly one). Over all 24^4 scenes of four colored shapes that agree with them, the eighth question must still have
at least two possible answers. This is checked exhaustively for every scene: a question is a table of its answer in each of
the 331,776 scenes, and the scenes that agree with an answer are one bit each.

**Balance.** Each question is the one whose answer was the rarest so far among questions of its kind, so that the most common
answer of a kind is a weak guess. Kinds are finer than categories: shapes and colors are balanced separately.

    category   kinds                                                    answers
    place      "what shape is at the top left?", "what color ..."       a shape, a color
    neighbour  "what shape is to the right of the red circle?", ...     a shape, a color
    count      "how many circles are there?", "how many red shapes ..." 0 to 4
    presence   "is there a blue triangle?", of a color in the scene     yes, no
"""

from __future__ import annotations

import random
from collections import Counter
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from voco.demo.easy_vqa_shapes import COLORS, SHAPES, Label

CELL_NAMES = ("top left", "top right", "bottom left", "bottom right")
# Questions of each category in a scene, hardest to fit first. Half of them are about places: a mean over an image loses where
# things are, so these questions separate compression methods.
MIX = {"neighbour": 1, "place": 4, "presence": 1, "count": 2}
PER_SCENE = sum(MIX.values())
# A relation's pairs of cells: (cell of the shape that the question names, cell of the shape in the answer).
RELATIONS = {
    "to the right of": ((0, 1), (2, 3)),
    "to the left of": ((1, 0), (3, 2)),
    "below": ((0, 2), (1, 3)),
    "above": ((2, 0), (3, 1)),
}
LABEL_COUNT = len(COLORS) * len(SHAPES)
UNASKABLE = -1  # in a table: what the question presupposes is not true of this scene

Scene = list[Label]  # of the four CELL_NAMES


class Query(NamedTuple):
    """A question before it becomes text. Only the fields of its category are set."""

    category: str
    asks: str  # color, shape or yes/no; for a count: whether shapes of a color or of a shape are counted
    where: str = ""  # a cell's name, or a relation
    color: str = ""
    shape: str = ""

    def text(self) -> str:
        if self.category == "place":
            return f"what {self.asks} is at the {self.where}?"
        if self.category == "neighbour":
            return f"what {self.asks} is {self.where} the {self.color} {self.shape}?"
        if self.category == "count":
            return f"how many {self.shape}s are there?" if self.shape else f"how many {self.color} shapes are there?"
        return f"is there a {self.color} {self.shape}?"

    def answers(self) -> tuple[str, ...]:
        """Every possible answer; tables contain indices into it."""
        if self.category == "count":
            return ("0", "1", "2", "3", "4")
        return COLORS if self.asks == "color" else SHAPES if self.asks == "shape" else ("no", "yes")


def description(scene: Scene) -> str:
    """All four shapes with their colors, in the order of `CELL_NAMES`."""
    return ", ".join(f"{color} {shape}" for color, shape in scene)


@lru_cache(maxsize=1)
def _scenes() -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Color and shape indices of every scene: two (331776, 4) arrays; a scene's row is `scene_index(scene)`."""
    labels = np.stack(np.unravel_index(np.arange(LABEL_COUNT**4), (LABEL_COUNT,) * 4), axis=1)
    return (labels // len(SHAPES)).astype(np.int8), (labels % len(SHAPES)).astype(np.int8)


def scene_index(scene: Scene) -> int:
    """The scene's row in every table."""
    index = 0
    for color, shape in scene:
        index = index * LABEL_COUNT + COLORS.index(color) * len(SHAPES) + SHAPES.index(shape)
    return index


@cache
def answer_table(query: Query) -> NDArray[np.int8]:
    """The answer's index in every scene (331776,), or UNASKABLE."""
    colors, shapes = _scenes()
    values = colors if query.asks == "color" else shapes
    if query.category == "place":
        return np.ascontiguousarray(values[:, CELL_NAMES.index(query.where)])
    named = np.ones(colors.shape, dtype=bool)
    if query.color:
        named &= colors == COLORS.index(query.color)
    if query.shape:
        named &= shapes == SHAPES.index(query.shape)
    if query.category == "count":
        counted: NDArray[np.int8] = named.sum(axis=1, dtype=np.int8)
        return counted
    if query.category == "presence":
        return np.asarray(named.any(axis=1)).astype(np.int8)
    table = np.full(len(colors), UNASKABLE, dtype=np.int8)
    unique = named.sum(axis=1) == 1
    for named_cell, answer_cell in RELATIONS[query.where]:
        table = np.where(unique & named[:, named_cell], values[:, answer_cell], table)
    return table


@cache
def agreeing(query: Query, answer: int) -> NDArray[np.uint64]:
    """The scenes in which the question has this answer: (5184,) words of one bit per scene."""
    return np.packbits(answer_table(query) == answer).view(np.uint64)


class IndependentQuestions:
    """Questions about a scene, added one by one as long as none follows from the others.

    `_others[i]` is the set of scenes that agree with every question but i and have another answer to i: never empty.
    """

    def __init__(self) -> None:
        self._agree = np.full(LABEL_COUNT**4 // 64, np.iinfo(np.uint64).max)  # with every question so far
        self._others = np.empty((0, LABEL_COUNT**4 // 64), dtype=np.uint64)

    def try_add(self, query: Query, answer: int) -> bool:
        """Add the question unless that breaks the rule; returns whether it was added."""
        agree = agreeing(query, answer)
        # A scene in which the question cannot be asked does not count as another answer.
        other = self._agree & ~agree & ~agreeing(query, UNASKABLE)
        if not other.any():
            return False
        others = np.vstack([self._others & agree, other])
        if not others.any(axis=1).all():
            return False
        self._agree = self._agree & agree
        self._others = others
        return True


def _candidates(scene: Scene) -> dict[str, list[Query]]:
    """The questions that fit this scene, by category."""
    colors = sorted({color for color, _ in scene})
    # A single absent color: with all of them, most counts by color would be 0.
    absent = [color for color in COLORS if color not in colors][scene_index(scene) % 4 :][:1]
    return {
        "place": [Query("place", asks, where=cell) for asks in ("color", "shape") for cell in CELL_NAMES],
        "count": [Query("count", "shape", shape=shape) for shape in SHAPES]
        + [Query("count", "color", color=color) for color in colors + absent],
        "presence": [Query("presence", "yes/no", color=color, shape=shape) for color in colors for shape in SHAPES],
        "neighbour": [
            Query("neighbour", asks, where=relation, color=scene[cell][0], shape=scene[cell][1])
            for relation, pairs in RELATIONS.items()
            for cell, _ in pairs
            for asks in ("color", "shape")
            if scene.count(scene[cell]) == 1
        ],
    }


class QuestionSampler:
    """Draws the questions of one scene after another and balances the answers over all scenes."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._answer_counts: Counter[tuple[str, str, int]] = Counter()  # (category, asks, answer)

    def draw(self, scene: Scene) -> list[tuple[str, str, str]] | None:
        """(category, question, answer) in random order; None when the drawn candidates give no independent eight."""
        candidates, row, counts = _candidates(scene), scene_index(scene), self._answer_counts
        # A "yes" fits with the other questions less often than a "no", so the rarer of the two is required.
        rarer = min((0, 1), key=lambda answer: counts[("presence", "yes/no", answer)])
        candidates["presence"] = [query for query in candidates["presence"] if int(answer_table(query)[row]) == rarer]
        # For balance, a count of 0 is not drawn while 0 is a more common answer than 1.
        excess = {asks for asks in ("color", "shape") if counts[("count", asks, 0)] > counts[("count", asks, 1)]}
        candidates["count"] = [
            query for query in candidates["count"] if query.asks not in excess or int(answer_table(query)[row])
        ]
        accepted, drawn = IndependentQuestions(), []
        for category in MIX:
            for _ in range(MIX[category]):
                query = self._draw_query(candidates[category], accepted, row)
                if query is None:
                    return None
                drawn.append((query, int(answer_table(query)[row])))
        counts.update((query.category, query.asks, answer) for query, answer in drawn)
        self._rng.shuffle(drawn)
        return [(query.category, query.text(), query.answers()[answer]) for query, answer in drawn]

    def _draw_query(self, candidates: list[Query], accepted: IndependentQuestions, row: int) -> Query | None:
        """Of the candidates that can be added, the one whose answer is rarest; it and rejected ones are removed."""

        def answer_share(query: Query) -> int:
            return self._answer_counts[(query.category, query.asks, int(answer_table(query)[row]))] * len(query.answers())

        self._rng.shuffle(candidates)
        candidates.sort(key=answer_share)
        while candidates:
            query = candidates.pop(0)
            if accepted.try_add(query, int(answer_table(query)[row])):
                return query
        return None
