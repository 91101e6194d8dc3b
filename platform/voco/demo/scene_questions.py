"""Eight questions about a 2x2 scene, none of which gives away another.

**The rule.** Take any seven of a scene's questions with their answers, and what their texts take for granted ("the red
circle": there is exactly one). Over all 24^4 scenes of four colored shapes that agree with them, the eighth question
must still have at least two possible answers. This is checked for every scene, by counting: a question is a table of its
answer in each of the 331,776 scenes, and the scenes that agree with a question are one bit each.

**Balance.** A question is drawn for the answer that was given least so far to questions of its kind, so that the most
common answer of a kind is a weak guess. Kinds are finer than categories: shapes and colors are balanced apart.

    category   kinds                                                    answers
    place      "what shape is at the top left?", "what color ..."       a shape, a color
    neighbour  "what shape is to the right of the red circle?", ...     a shape, a color
    count      "how many circles are there?", "how many red shapes ..." 0 to 4
    presence   "is there a blue triangle?" of a color that is there     yes, no
"""

from __future__ import annotations

import random
from collections import Counter
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from voco.demo.easy_vqa_shapes import COLORS, SHAPES

PLACES = ("top left", "top right", "bottom left", "bottom right")
# Questions of each category in a scene, hardest to fit first. Places are most of it: where things are is what a mean over an
# image loses, so these questions tell compression methods apart.
MIX = {"neighbour": 1, "place": 4, "presence": 1, "count": 2}
PER_SCENE = sum(MIX.values())
# A relation's pairs of places: (where the named shape is, where the asked one is).
RELATIONS = {
    "to the right of": ((0, 1), (2, 3)),
    "to the left of": ((1, 0), (3, 2)),
    "below": ((0, 2), (1, 3)),
    "above": ((2, 0), (3, 1)),
}
KINDS = len(COLORS) * len(SHAPES)  # of one place: color x shape
UNASKABLE = -1  # in a table: the question's text is not true of this scene

Scene = list[tuple[str, str]]  # (color, shape) of the four PLACES


class Query(NamedTuple):
    """A question before it is words. Only the fields of its category are set."""

    category: str
    asks: str  # color, shape, number or yes/no; count: what is counted by, color or shape
    where: str = ""  # a place, or a relation
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
        """Every possible answer; a table holds indices into it."""
        if self.category == "count":
            return ("0", "1", "2", "3", "4")
        return COLORS if self.asks == "color" else SHAPES if self.asks == "shape" else ("no", "yes")


@lru_cache(maxsize=1)
def _scenes() -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Color and shape indices of every scene: two (331776, 4) arrays; a row's number is `number(scene)`."""
    kinds = np.stack(np.unravel_index(np.arange(KINDS**4), (KINDS,) * 4), axis=1)
    return (kinds // len(SHAPES)).astype(np.int8), (kinds % len(SHAPES)).astype(np.int8)


def number(scene: Scene) -> int:
    """The scene's row in every table."""
    result = 0
    for color, shape in scene:
        result = result * KINDS + COLORS.index(color) * len(SHAPES) + SHAPES.index(shape)
    return result


@cache
def answer_table(query: Query) -> NDArray[np.int8]:
    """The answer's index in every scene (331776,), or UNASKABLE."""
    colors, shapes = _scenes()
    asked = colors if query.asks == "color" else shapes
    if query.category == "place":
        return np.ascontiguousarray(asked[:, PLACES.index(query.where)])
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
    result = np.full(len(colors), UNASKABLE, dtype=np.int8)
    alone = named.sum(axis=1) == 1
    for here, beside in RELATIONS[query.where]:
        result = np.where(alone & named[:, here], asked[:, beside], result)
    return result


@cache
def agreeing(query: Query, answer: int) -> NDArray[np.uint64]:
    """The scenes where the question has this answer, one bit each (5184,)."""
    return np.packbits(answer_table(query) == answer).view(np.uint64)


class Independent:
    """Questions about one scene, taken one by one as long as none is given away.

    `others[i]` holds the scenes that agree with every question but i and answer i differently: it must not be empty.
    """

    def __init__(self) -> None:
        self._agree = np.full(KINDS**4 // 64, np.iinfo(np.uint64).max)  # with every question so far
        self._others = np.empty((0, KINDS**4 // 64), dtype=np.uint64)

    def take(self, query: Query, answer: int) -> bool:
        """Add the question if the rule still holds, and say whether it was added."""
        agree = agreeing(query, answer)
        # A scene where the question cannot be asked does not count as another answer.
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
    """What may be asked of this scene, by category."""
    colors = sorted({color for color, _ in scene})
    # One color that is not there, or most counts by color would be 0.
    absent = [color for color in COLORS if color not in colors][number(scene) % 4 :][:1]
    found = {
        "place": [Query("place", asks, where=place) for asks in ("color", "shape") for place in PLACES],
        "count": [Query("count", "shape", shape=shape) for shape in SHAPES]
        + [Query("count", "color", color=color) for color in colors + absent],
        "presence": [Query("presence", "yes/no", color=color, shape=shape) for color in colors for shape in SHAPES],
        "neighbour": [
            Query("neighbour", asks, where=relation, color=scene[here][0], shape=scene[here][1])
            for relation, pairs in RELATIONS.items()
            for here, _ in pairs
            for asks in ("color", "shape")
            if scene.count(scene[here]) == 1
        ],
    }
    return found


class Asker:
    """Draws questions for one scene after another and keeps the answers balanced over all of them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._given: Counter[tuple[str, str, int]] = Counter()  # (category, asks, answer)

    def ask(self, scene: Scene) -> list[tuple[str, str, str]] | None:
        """(category, question, answer) in random order, or None when no fair eight were found."""
        candidates, row = _candidates(scene), number(scene)
        # A "yes" fits beside the other questions less often than a "no", so the rarer of the two is insisted on.
        wanted = min((0, 1), key=lambda answer: self._given[("presence", "yes/no", answer)])
        candidates["presence"] = [query for query in candidates["presence"] if int(answer_table(query)[row]) == wanted]
        # So does a count of 0: none is asked for while 0 leads 1.
        leads = {asks for asks in ("color", "shape") if self._given[("count", asks, 0)] > self._given[("count", asks, 1)]}
        candidates["count"] = [query for query in candidates["count"] if query.asks not in leads or int(answer_table(query)[row])]
        taken, drawn = Independent(), []
        for category in MIX:
            for _ in range(MIX[category]):
                query = self._draw(candidates[category], taken, row)
                if query is None:
                    return None
                drawn.append((query, int(answer_table(query)[row])))
        self._given.update((query.category, query.asks, answer) for query, answer in drawn)
        self._rng.shuffle(drawn)
        return [(query.category, query.text(), query.answers()[answer]) for query, answer in drawn]

    def _draw(self, left: list[Query], taken: Independent, row: int) -> Query | None:
        """Take, and remove from `left`, the question whose answer is furthest below its even share and that may be taken."""
        self._rng.shuffle(left)
        left.sort(
            key=lambda query: self._given[(query.category, query.asks, int(answer_table(query)[row]))] * len(query.answers())
        )
        while left:
            query = left.pop(0)
            if taken.take(query, int(answer_table(query)[row])):
                return query
        return None
