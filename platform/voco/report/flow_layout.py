"""Where boxes and arrows of a flow go: layers from top to bottom, few crossings, long arrows led past the boxes between.

The layered drawing of Sugiyama, Tagawa and Toda (1981): layers by the longest way, an invisible node in every layer that an
arrow passes, orders by barycentres, then positions near the neighbours' mean. Lengths are in the units of the view box.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

GAP_X, GAP_Y, MARGIN = 14.0, 36.0, 6.0
LANE = 10.0  # width that an arrow takes on its way past boxes
ROUNDS = 12
IN_ROW = 5  # boxes that no arrow touches, side by side

Node = str | tuple[str, str, int]  # a box, or the arrow (parent, child) where it passes a layer
Point = tuple[float, float]


@dataclass(frozen=True)
class FlowLayout:
    """Left upper corners of the boxes, corners of each arrow from the parent's lower edge to the child's upper, the size."""

    boxes: dict[str, Point]
    arrows: list[list[Point]]
    width: float
    height: float


def direct_parents(name: str, parents: dict[str, list[str]]) -> list[str]:
    """The parents that are not also reached through another parent."""
    through = {far for parent in parents[name] for far in _ancestors(parent, parents)}
    return [parent for parent in dict.fromkeys(parents[name]) if parent not in through]


def _ancestors(name: str, parents: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    todo = list(parents[name])
    while todo:
        parent = todo.pop()
        if parent not in found:
            found.add(parent)
            todo += parents[parent]
    return found


def layout_flow(parents: dict[str, list[str]], width: float, heights: dict[str, float]) -> FlowLayout:
    """Boxes of one width and of their own heights, those that no arrow touches in rows below the others.

    Every parent must be a key of `parents` too.
    """
    touched = {name for child, found in parents.items() if found for name in (child, *found)}
    joined = {name: found for name, found in parents.items() if name in touched}
    drawing = _joined(joined, width, heights) if joined else FlowLayout({}, [], 2 * MARGIN, MARGIN)
    alone = [name for name in parents if name not in touched]
    across = max(IN_ROW, int((drawing.width - 2 * MARGIN + GAP_X) / (width + GAP_X)))
    boxes, right, down = dict(drawing.boxes), drawing.width, drawing.height + (GAP_Y - MARGIN if joined else 0)
    for start in range(0, len(alone), across):
        row = alone[start : start + across]
        boxes |= {name: (MARGIN + at * (width + GAP_X), down) for at, name in enumerate(row)}
        right = max(right, 2 * MARGIN + len(row) * (width + GAP_X) - GAP_X)
        down += max(heights[name] for name in row) + GAP_X
    return FlowLayout(boxes, drawing.arrows, right, down - GAP_X + MARGIN if alone else drawing.height)


def _joined(parents: dict[str, list[str]], width: float, heights: dict[str, float]) -> FlowLayout:
    edges = [(parent, name) for name in parents for parent in direct_parents(name, parents)]
    layer = _layers(parents)
    count = 1 + max(layer.values())
    rows: list[list[Node]] = [[name for name in parents if layer[name] == at] for at in range(count)]
    above: dict[Node, list[Node]] = {name: [] for name in parents}
    ways: dict[tuple[str, str], list[Node]] = {}
    for parent, child in edges:
        passed: list[Node] = [(parent, child, at) for at in range(layer[parent] + 1, layer[child])]
        for node in passed:
            rows[node[2]].append(node)  # type: ignore[index]
        way: list[Node] = [parent, *passed, child]
        ways[parent, child] = way
        for upper, lower in itertools.pairwise(way):
            above.setdefault(lower, []).append(upper)
    below: dict[Node, list[Node]] = {}
    for lower, uppers in above.items():
        for upper in uppers:
            below.setdefault(upper, []).append(lower)
    rows = _ordered(rows, above, below)
    centre = _centres(rows, above, below, width)
    tall = [max([heights[node] for node in row if isinstance(node, str)], default=0.0) for row in rows]
    top = [MARGIN + sum(tall[:at]) + GAP_Y * at for at in range(count)]
    boxes = {name: (centre[name] - width / 2, top[layer[name]]) for name in parents}
    arrows = []
    for (parent, child), way in ways.items():
        first = layer[parent]
        points = [(centre[parent], top[first] + heights[parent]), (centre[parent], top[first] + tall[first])]
        for at, node in enumerate(way[1:-1], first + 1):
            points += [(centre[node], top[at]), (centre[node], top[at] + tall[at])]
        arrows.append([*points, (centre[child], top[layer[child]])])
    right = max(x + width for x, _ in boxes.values())
    right = max([right, *(x for arrow in arrows for x, _ in arrow)])
    return FlowLayout(boxes, arrows, right + MARGIN, top[-1] + tall[-1] + MARGIN)


def _layers(parents: dict[str, list[str]]) -> dict[str, int]:
    """The longest way from a box without parents; those themselves just above the first that needs them."""
    found: dict[str, int] = {}

    def deep(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((deep(parent) for parent in parents[name]), default=-1)
        return found[name]

    for name in parents:
        deep(name)
    for name in parents:
        children = [found[child] for child in parents if name in direct_parents(child, parents)]
        if not parents[name] and children:
            found[name] = min(children) - 1
    return found


def _ordered(rows: list[list[Node]], above: dict[Node, list[Node]], below: dict[Node, list[Node]]) -> list[list[Node]]:
    """The order within each layer with the fewest crossings among those that barycentres give, down and up in turn."""
    best, fewest = rows, _crossings(rows, above)
    now = rows
    for turn in range(ROUNDS):
        near = above if turn % 2 == 0 else below
        made: list[list[Node]] = []
        for row in now if turn % 2 == 0 else now[::-1]:
            last = {node: place for place, node in enumerate(made[-1])} if made else {}
            place = {node: at for at, node in enumerate(row)}
            mean = {
                node: sum(last[one] for one in near.get(node, [])) / len(near[node]) if near.get(node) else place[node]
                for node in row
            }
            made.append(sorted(row, key=lambda node: mean[node]) if made else list(row))
        now = made if turn % 2 == 0 else made[::-1]
        if (crossed := _crossings(now, above)) < fewest:
            best, fewest = now, crossed
    return best


def _crossings(rows: list[list[Node]], above: dict[Node, list[Node]]) -> int:
    total = 0
    for upper, row in itertools.pairwise(rows):
        place = {node: at for at, node in enumerate(upper)}
        ends = [place[one] for node in row for one in sorted(above.get(node, []), key=lambda one: place[one])]
        total += sum(one > other for index, one in enumerate(ends) for other in ends[index + 1 :])
    return total


def _centres(
    rows: list[list[Node]], above: dict[Node, list[Node]], below: dict[Node, list[Node]], width: float
) -> dict[Node, float]:
    """Centres across: near the mean of the neighbours' above and below, apart by at least the boxes' widths and a gap."""
    half = {node: width / 2 if isinstance(node, str) else LANE / 2 for row in rows for node in row}
    centre: dict[Node, float] = {}
    for row in rows:
        at = 0.0
        for node in row:
            centre[node] = at + half[node]
            at += 2 * half[node] + GAP_X
    for turn in range(4 * ROUNDS):
        for row in rows if turn % 2 == 0 else rows[::-1]:
            wanted = []
            for node in row:
                near = above.get(node, []) + below.get(node, [])
                wanted.append(sum(centre[one] for one in near) / len(near) if near else centre[node])
            apart = [half[one] + half[other] + GAP_X for one, other in itertools.pairwise(row)]
            centre.update(zip(row, _spread(wanted, apart), strict=True))
    left = min(centre[node] - half[node] for node in centre)
    return {node: value - left + MARGIN for node, value in centre.items()}


def _spread(wanted: list[float], apart: list[float]) -> list[float]:
    """Places nearest to the wanted ones by least squares that keep their order and distances (pool adjacent violators)."""
    shift = [sum(apart[:index]) for index in range(len(wanted))]
    pools: list[list[float]] = []  # sum and size of each
    for value, off in zip(wanted, shift, strict=True):
        pools.append([value - off, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, size = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += size
    flat = [total / size for total, size in pools for _ in range(int(size))]
    return [value + off for value, off in zip(flat, shift, strict=True)]
