"""The events of a clip of two shapes, questions about it that need the order of frames, and captions.

A clip is a 2x2 grid. One shape, the mover, appears, slides once to an adjacent cell, and disappears. The other, the blinker,
appears one to three times in a cell that the mover never uses. A clip is described by its states at whole seconds, which
are what sampling at one frame per second sees.

    category   question                                                  answers
    direction  "which way does the circle move?"                         left, right, up, down
    first      "what comes first, the circle or the triangle?"           one of the two shapes
    count      "how many times does the triangle appear?"                1, 2, 3
    color      "what color is the circle?"; needs no order               a color

**The rule.** The multiset of states carries no information about direction, first or count: their order is needed. A multiset
is the number of states with the mover in one cell, in the other or absent, with the blinker present or not. A draw first
decides whether "the mover goes backward (left or up)" equals "the mover comes first". Then it picks a multiset that is possible
for every direction, first and count under that choice, and only then the answers, each uniformly. The first state is empty,
so that the first frame alone carries no information.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from voco.demo.easy_vqa_shapes import COLORS, SHAPES, Label
from voco.demo.scene_questions import CELL_NAMES

CLIP_SECONDS = 8  # states of a clip, at 0 to 7 seconds
COUNTS = (1, 2, 3)
CATEGORIES = ("direction", "first", "count", "color")
# The mover's (first cell, second cell), as indices into CELL_NAMES.
DIRECTIONS = {"right": ((0, 1), (2, 3)), "left": ((1, 0), (3, 2)), "down": ((0, 2), (1, 3)), "up": ((2, 0), (3, 1))}
BACKWARD = ("left", "up")  # directions from a higher cell index to a lower one
TIMES = {1: "once", 2: "twice", 3: "three times"}
SUMMARIES = (
    "a {first} appears before a {second}, the {mover} moves {direction} and the {blinker} is seen {times}",
    "first a {first}, then a {second} : the {mover} moves {direction}, the {blinker} comes {times}",
)

# Number of states: mover (in the cell of the lower index, in the other, absent) x blinker (present, absent).
StateCounts = tuple[int, ...]


class Timeline(NamedTuple):
    """The states at whole seconds."""

    enters: int  # the first state with the mover, in its first cell
    moves: int  # the first state with the mover in its second cell
    leaves: int  # the first state without the mover
    shown: tuple[bool, ...]  # whether the blinker is visible, in each state

    def mover_first(self) -> bool:
        return self.enters < self.shown.index(True)

    def appearances(self) -> list[int]:
        """The first state of each of the blinker's appearances."""
        return [second for second in range(1, CLIP_SECONDS) if self.shown[second] and not self.shown[second - 1]]

    def state_counts(self, backward: bool) -> StateCounts:
        """The multiset of states."""
        first, second = (1, 0) if backward else (0, 1)
        counts = [0] * 6
        for state, shown in enumerate(self.shown):
            mover = 2 if not self.enters <= state < self.leaves else first if state < self.moves else second
            counts[2 * mover + (not shown)] += 1
        return tuple(counts)


class Clip(NamedTuple):
    """Everything that decides the answers and the pictures, except which image shows each label."""

    mover: Label
    blinker: Label
    direction: str
    mover_cells: tuple[int, int]  # first and second, as indices into CELL_NAMES
    blinker_cell: int
    timeline: Timeline
    mover_named_first: bool  # in the question "what comes first"

    def first(self) -> Label:
        return self.mover if self.timeline.mover_first() else self.blinker

    def times(self) -> int:
        return len(self.timeline.appearances())


Outcome = tuple[bool, bool, int]  # (backward, mover first, count)


@cache
def timelines() -> dict[bool, list[dict[Outcome, list[Timeline]]]]:
    """All timelines that the rule allows: by "backward equals mover first", a list of multisets, each by outcome."""
    by_states: dict[tuple[bool, StateCounts], dict[Outcome, list[Timeline]]] = {}
    for enters, moves, leaves in itertools.combinations(range(1, CLIP_SECONDS + 1), 3):
        for bits in itertools.product((False, True), repeat=CLIP_SECONDS - 1):
            timeline = Timeline(enters, moves, leaves, (False, *bits))
            appearances = timeline.appearances()
            if len(appearances) not in COUNTS or appearances[0] == enters:
                continue
            mover_first = timeline.mover_first()
            for backward in (False, True):
                by_outcome = by_states.setdefault((backward == mover_first, timeline.state_counts(backward)), {})
                by_outcome.setdefault((backward, mover_first, len(appearances)), []).append(timeline)
    allowed: dict[bool, list[dict[Outcome, list[Timeline]]]] = {False: [], True: []}
    for (equal, _), by_outcome in sorted(by_states.items()):
        if len(by_outcome) == 2 * len(COUNTS):
            allowed[equal].append(by_outcome)
    return allowed


def draw_clips(count: int, rng: random.Random) -> Iterator[Clip]:
    """`count` clips with uniform, independent directions, orders, numbers, pairs of shapes and orders of naming."""
    combinations = list(itertools.product(DIRECTIONS, (False, True), COUNTS, itertools.permutations(SHAPES, 2), (False, True)))
    deck: list[tuple[str, bool, int, tuple[str, ...], bool]] = []
    for _ in range(count):
        if not deck:
            deck = rng.sample(combinations, len(combinations))
        direction, mover_first, times, (mover, blinker), mover_named_first = deck.pop()
        mover_cells = rng.choice(DIRECTIONS[direction])
        blinker_cell = rng.choice([cell for cell in range(len(CELL_NAMES)) if cell not in mover_cells])
        backward = direction in BACKWARD
        timeline = rng.choice(rng.choice(timelines()[backward == mover_first])[backward, mover_first, times])
        labels = ((rng.choice(COLORS), mover), (rng.choice(COLORS), blinker))
        yield Clip(*labels, direction, mover_cells, blinker_cell, timeline, mover_named_first)


def clip_questions(clip: Clip, rng: random.Random) -> list[tuple[str, str, str]]:
    """(category, question, answer): one of each category, in random order."""
    mover, blinker = clip.mover[1], clip.blinker[1]
    shapes = (mover, blinker) if clip.mover_named_first else (blinker, mover)
    color, shape = rng.choice((clip.mover, clip.blinker))
    questions = [
        ("direction", f"which way does the {mover} move?", clip.direction),
        ("first", f"what comes first, the {shapes[0]} or the {shapes[1]}?", clip.first()[1]),
        ("count", f"how many times does the {blinker} appear?", str(clip.times())),
        ("color", f"what color is the {shape}?", color),
    ]
    rng.shuffle(questions)
    return questions


def caption(clip: Clip, rng: random.Random) -> str:
    """The events in order, as a list of events or as one of a few summaries."""
    second = clip.blinker if clip.first() == clip.mover else clip.mover
    if rng.random() < 0.5:
        names = {"first": " ".join(clip.first()), "second": " ".join(second), "mover": clip.mover[1], "blinker": clip.blinker[1]}
        return rng.choice(SUMMARIES).format(**names, direction=clip.direction, times=TIMES[clip.times()])
    color, shape = clip.blinker
    appearances = clip.timeline.appearances()
    events = [
        (clip.timeline.enters, f"a {' '.join(clip.mover)} appears"),
        (clip.timeline.moves, f"the {clip.mover[1]} moves {clip.direction}"),
        (appearances[0], f"a {color} {shape} appears"),
        *((state, f"the {shape} appears again") for state in appearances[1:]),
    ]
    by_second = itertools.groupby(sorted(events), key=lambda event: event[0])
    return ", then ".join(" and ".join(text for _, text in simultaneous) for _, simultaneous in by_second)
