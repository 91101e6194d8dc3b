"""What happens in a clip of two shapes, questions about it that need order and time, and captions that tell it.

A clip is a 2x2 grid. One shape, the mover, appears, slides once to the cell beside, above or below, and disappears. Another,
the blinker, appears one to three times in a cell that the mover never uses. A clip is known by its states at whole seconds,
which is what sampling at one frame a second sees.

    category   question                                                  answers
    direction  "which way does the circle move?"                         left, right, up, down
    first      "what comes first, the circle or the triangle?"           one of the two shapes
    count      "how many times does the triangle appear?"                1, 2, 3
    color      "what color is the circle?"; needs no order               a color

**The rule.** The states without their order say nothing about any one of direction, first and count. States are counted: how
often the mover is in one cell, in the other or away, with the blinker there or not. A draw decides first whether the mover
goes backward (left or up) exactly when it comes first, then the counts, of those that arise either way, whichever comes first,
with each number; and only then the answers, each evenly. Nothing is there in the first state, so that frame alone says nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from voco.demo.easy_vqa_shapes import COLORS, SHAPES
from voco.demo.scene_questions import PLACES

SECONDS = 8  # states of a clip, at 0 to 7 seconds
COUNTS = (1, 2, 3)
CATEGORIES = ("direction", "first", "count", "color")
# The mover's (first place, second place), as indices into PLACES.
WAYS = {"right": ((0, 1), (2, 3)), "left": ((1, 0), (3, 2)), "down": ((0, 2), (1, 3)), "up": ((2, 0), (3, 1))}
BACKWARD = ("left", "up")  # ways from a later place to an earlier one
TIMES = {1: "once", 2: "twice", 3: "three times"}
SUMMARIES = (
    "a {first} appears before a {second}, the {mover} moves {way} and the {blinker} is seen {times}",
    "first a {first}, then a {second} : the {mover} moves {way}, the {blinker} comes {times}",
)

Label = tuple[str, str]  # (color, shape)
Counted = tuple[int, ...]  # states with the mover (in the earlier place, in the later, away) x the blinker (there, not)


class Timeline(NamedTuple):
    """What is where at whole seconds."""

    enters: int  # the first state with the mover, in its first place
    moves: int  # the first state with it in its second place
    leaves: int  # the first state without it
    shown: tuple[bool, ...]  # the blinker, at each of the SECONDS

    def mover_first(self) -> bool:
        return self.enters < self.shown.index(True)

    def appearances(self) -> list[int]:
        """The first state of each of the blinker's appearances."""
        return [second for second in range(1, SECONDS) if self.shown[second] and not self.shown[second - 1]]

    def counted(self, backward: bool) -> Counted:
        """The states without their order."""
        first, second = (1, 0) if backward else (0, 1)
        counts = [0] * 6
        for state, shown in enumerate(self.shown):
            mover = 2 if not self.enters <= state < self.leaves else first if state < self.moves else second
            counts[2 * mover + (not shown)] += 1
        return tuple(counts)


class Clip(NamedTuple):
    """Everything that the answers and the pictures follow from, but for which images of the labels are taken."""

    mover: Label
    blinker: Label
    way: str
    path: tuple[int, int]  # places of the mover
    spot: int  # place of the blinker
    timeline: Timeline
    mover_named_first: bool  # in the question what comes first

    def first(self) -> Label:
        return self.mover if self.timeline.mover_first() else self.blinker

    def times(self) -> int:
        return len(self.timeline.appearances())


Outcome = tuple[bool, bool, int]  # (backward, mover first, count)


@cache
def timelines() -> dict[bool, list[dict[Outcome, list[Timeline]]]]:
    """All timelines that the rule allows, by whether backward equals mover first, by counted states, by outcome."""
    found: dict[tuple[bool, Counted], dict[Outcome, list[Timeline]]] = {}
    for enters, moves, leaves in itertools.combinations(range(1, SECONDS + 1), 3):
        for bits in itertools.product((False, True), repeat=SECONDS - 1):
            timeline = Timeline(enters, moves, leaves, (False, *bits))
            appearances = timeline.appearances()
            if len(appearances) not in COUNTS or appearances[0] == enters:
                continue
            mover_first = timeline.mover_first()
            for backward in (False, True):
                same = found.setdefault((backward == mover_first, timeline.counted(backward)), {})
                same.setdefault((backward, mover_first, len(appearances)), []).append(timeline)
    allowed: dict[bool, list[dict[Outcome, list[Timeline]]]] = {False: [], True: []}
    for (equal, _), by_outcome in sorted(found.items()):
        if len(by_outcome) == 2 * len(COUNTS):
            allowed[equal].append(by_outcome)
    return allowed


def draw_clips(count: int, rng: random.Random) -> Iterator[Clip]:
    """`count` clips. Ways, orders, numbers, pairs of shapes and orders of naming come equally often, independently."""
    everything = list(itertools.product(WAYS, (False, True), COUNTS, itertools.permutations(SHAPES, 2), (False, True)))
    deck: list[tuple[str, bool, int, tuple[str, ...], bool]] = []
    for _ in range(count):
        if not deck:
            deck = rng.sample(everything, len(everything))
        way, mover_first, times, (mover, blinker), mover_named_first = deck.pop()
        path = rng.choice(WAYS[way])
        spot = rng.choice([place for place in range(len(PLACES)) if place not in path])
        backward = way in BACKWARD
        timeline = rng.choice(rng.choice(timelines()[backward == mover_first])[backward, mover_first, times])
        labels = ((rng.choice(COLORS), mover), (rng.choice(COLORS), blinker))
        yield Clip(*labels, way, path, spot, timeline, mover_named_first)


def clip_questions(clip: Clip, rng: random.Random) -> list[tuple[str, str, str]]:
    """(category, question, answer): one of each category, in random order."""
    mover, blinker = clip.mover[1], clip.blinker[1]
    one, other = (mover, blinker) if clip.mover_named_first else (blinker, mover)
    color, shape = rng.choice((clip.mover, clip.blinker))
    asked = [
        ("direction", f"which way does the {mover} move?", clip.way),
        ("first", f"what comes first, the {one} or the {other}?", clip.first()[1]),
        ("count", f"how many times does the {blinker} appear?", str(clip.times())),
        ("color", f"what color is the {shape}?", color),
    ]
    rng.shuffle(asked)
    return asked


def caption(clip: Clip, rng: random.Random) -> str:
    """What happens, in order: appearances and the move one after another, or in one of a few summaries."""
    second = clip.blinker if clip.first() == clip.mover else clip.mover
    if rng.random() < 0.5:
        names = {"first": " ".join(clip.first()), "second": " ".join(second), "mover": clip.mover[1], "blinker": clip.blinker[1]}
        return rng.choice(SUMMARIES).format(**names, way=clip.way, times=TIMES[clip.times()])
    color, shape = clip.blinker
    appearances = clip.timeline.appearances()
    events = [
        (clip.timeline.enters, f"a {' '.join(clip.mover)} appears"),
        (clip.timeline.moves, f"the {clip.mover[1]} moves {clip.way}"),
        (appearances[0], f"a {color} {shape} appears"),
        *((state, f"the {shape} appears again") for state in appearances[1:]),
    ]
    told = itertools.groupby(sorted(events), key=lambda event: event[0])
    return ", then ".join(" and ".join(text for _, text in together) for _, together in told)
