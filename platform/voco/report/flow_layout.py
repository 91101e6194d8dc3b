"""Positions of the boxes and arrows of a flow: layers from top to bottom, few crossings, long arrows routed around boxes.

Layered drawing after Sugiyama, Tagawa and Toda (1981): longest-path layers, a dummy node in every layer that an arrow
passes, ordering by barycentres, then coordinates near the mean of the neighbours. Lengths are in view box units.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

GAP_X, GAP_Y, MARGIN = 14.0, 36.0, 6.0
LANE = 10.0  # width of an arrow that passes boxes
PASSES = 12  # barycentre passes
BOXES_PER_ROW = 5  # of boxes without arrows, at least

Node = str | tuple[str, str, int]  # a box, or the arrow (parent, child) where it passes a layer
Coordinates = tuple[float, float]  # x, y


@dataclass(frozen=True)
class FlowLayout:
    """Upper left corner of each box, points of each arrow from its parent's bottom edge to its child's top edge, and the size."""

    boxes: dict[str, Coordinates]
    arrows: list[list[Coordinates]]
    width: float
    height: float


def direct_parents(name: str, parents: dict[str, list[str]]) -> list[str]:
    """The parents that are not also ancestors of another parent."""
    indirect = {ancestor for parent in parents[name] for ancestor in _ancestors(parent, parents)}
    return [parent for parent in dict.fromkeys(parents[name]) if parent not in indirect]


def _ancestors(name: str, parents: dict[str, list[str]]) -> set[str]:
    ancestors: set[str] = set()
    todo = list(parents[name])
    while todo:
        parent = todo.pop()
        if parent not in ancestors:
            ancestors.add(parent)
            todo += parents[parent]
    return ancestors


def layout_flow(parents: dict[str, list[str]], width: float, heights: dict[str, float]) -> FlowLayout:
    """Boxes of equal width and given heights; boxes without arrows are in rows below the others.

    Every parent must be a key of `parents` too.
    """
    linked_names = {name for child, names in parents.items() if names for name in (child, *names)}
    linked = {name: names for name, names in parents.items() if name in linked_names}
    layout = _layout_linked(linked, width, heights) if linked else FlowLayout({}, [], 2 * MARGIN, MARGIN)
    isolated = [name for name in parents if name not in linked_names]
    per_row = max(BOXES_PER_ROW, int((layout.width - 2 * MARGIN + GAP_X) / (width + GAP_X)))
    boxes, right, y = dict(layout.boxes), layout.width, layout.height + (GAP_Y - MARGIN if linked else 0)
    for start in range(0, len(isolated), per_row):
        row = isolated[start : start + per_row]
        boxes |= {name: (MARGIN + column * (width + GAP_X), y) for column, name in enumerate(row)}
        right = max(right, 2 * MARGIN + len(row) * (width + GAP_X) - GAP_X)
        y += max(heights[name] for name in row) + GAP_X
    return FlowLayout(boxes, layout.arrows, right, y - GAP_X + MARGIN if isolated else layout.height)


def _layout_linked(parents: dict[str, list[str]], width: float, heights: dict[str, float]) -> FlowLayout:
    edges = [(parent, name) for name in parents for parent in direct_parents(name, parents)]
    layer = _layers(parents)
    count = 1 + max(layer.values())
    rows: list[list[Node]] = [[name for name in parents if layer[name] == index] for index in range(count)]
    above: dict[Node, list[Node]] = {name: [] for name in parents}
    paths: dict[tuple[str, str], list[Node]] = {}
    for parent, child in edges:
        passed: list[Node] = [(parent, child, index) for index in range(layer[parent] + 1, layer[child])]
        for node in passed:
            rows[node[2]].append(node)  # type: ignore[index]
        path: list[Node] = [parent, *passed, child]
        paths[parent, child] = path
        for upper, lower in itertools.pairwise(path):
            above.setdefault(lower, []).append(upper)
    below: dict[Node, list[Node]] = {}
    for lower, uppers in above.items():
        for upper in uppers:
            below.setdefault(upper, []).append(lower)
    rows = _ordered(rows, above, below)
    centre = _centres(rows, above, below, width)
    row_heights = [max([heights[node] for node in row if isinstance(node, str)], default=0.0) for row in rows]
    top = [MARGIN + sum(row_heights[:index]) + GAP_Y * index for index in range(count)]
    boxes = {name: (centre[name] - width / 2, top[layer[name]]) for name in parents}
    arrows = []
    for (parent, child), path in paths.items():
        first = layer[parent]
        points = [(centre[parent], top[first] + heights[parent]), (centre[parent], top[first] + row_heights[first])]
        for index, node in enumerate(path[1:-1], first + 1):
            points += [(centre[node], top[index]), (centre[node], top[index] + row_heights[index])]
        arrows.append([*points, (centre[child], top[layer[child]])])
    right = max(x + width for x, _ in boxes.values())
    right = max([right, *(x for arrow in arrows for x, _ in arrow)])
    return FlowLayout(boxes, arrows, right + MARGIN, top[-1] + row_heights[-1] + MARGIN)


def _layers(parents: dict[str, list[str]]) -> dict[str, int]:
    """Longest path from a box without parents; such a box itself is in the layer just above its first child."""
    layers: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in layers:
            layers[name] = 1 + max((depth(parent) for parent in parents[name]), default=-1)
        return layers[name]

    for name in parents:
        depth(name)
    for name in parents:
        children = [layers[child] for child in parents if name in direct_parents(child, parents)]
        if not parents[name] and children:
            layers[name] = min(children) - 1
    return layers


def _ordered(rows: list[list[Node]], above: dict[Node, list[Node]], below: dict[Node, list[Node]]) -> list[list[Node]]:
    """The order with the fewest crossings among those that the barycentre passes give, alternately down and up."""
    best, fewest = rows, _crossings(rows, above)
    current = rows
    for pass_index in range(PASSES):
        neighbours = above if pass_index % 2 == 0 else below
        ordered: list[list[Node]] = []
        for row in current if pass_index % 2 == 0 else current[::-1]:
            previous = {node: index for index, node in enumerate(ordered[-1])} if ordered else {}
            index_of = {node: index for index, node in enumerate(row)}
            mean = {
                node: sum(previous[near] for near in neighbours[node]) / len(neighbours[node])
                if neighbours.get(node)
                else index_of[node]
                for node in row
            }
            ordered.append(sorted(row, key=lambda node: mean[node]) if ordered else list(row))
        current = ordered if pass_index % 2 == 0 else ordered[::-1]
        if (crossings := _crossings(current, above)) < fewest:
            best, fewest = current, crossings
    return best


def _crossings(rows: list[list[Node]], above: dict[Node, list[Node]]) -> int:
    total = 0
    for upper, row in itertools.pairwise(rows):
        index_of = {node: index for index, node in enumerate(upper)}
        ends = [end for node in row for end in sorted(index_of[parent] for parent in above.get(node, []))]
        total += sum(end > later for index, end in enumerate(ends) for later in ends[index + 1 :])
    return total


def _centres(
    rows: list[list[Node]], above: dict[Node, list[Node]], below: dict[Node, list[Node]], width: float
) -> dict[Node, float]:
    """Horizontal centres: near the mean of the neighbours above and below, with at least GAP_X between two nodes."""
    half = {node: width / 2 if isinstance(node, str) else LANE / 2 for row in rows for node in row}
    centre: dict[Node, float] = {}
    for row in rows:
        x = 0.0
        for node in row:
            centre[node] = x + half[node]
            x += 2 * half[node] + GAP_X
    for pass_index in range(4 * PASSES):
        for row in rows if pass_index % 2 == 0 else rows[::-1]:
            targets = []
            for node in row:
                neighbours = above.get(node, []) + below.get(node, [])
                targets.append(sum(centre[near] for near in neighbours) / len(neighbours) if neighbours else centre[node])
            distances = [half[node] + half[following] + GAP_X for node, following in itertools.pairwise(row)]
            centre.update(zip(row, _spread(targets, distances), strict=True))
    left = min(centre[node] - half[node] for node in centre)
    return {node: value - left + MARGIN for node, value in centre.items()}


def _spread(targets: list[float], distances: list[float]) -> list[float]:
    """The least-squares nearest values to `targets` that keep their order and minimum distances (pool adjacent violators)."""
    shifts = [sum(distances[:index]) for index in range(len(targets))]
    pools: list[list[float]] = []  # (sum, size)
    for target, shift in zip(targets, shifts, strict=True):
        pools.append([target - shift, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, size = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += size
    flat = [total / size for total, size in pools for _ in range(int(size))]
    return [value + shift for value, shift in zip(flat, shifts, strict=True)]
