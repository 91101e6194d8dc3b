"""The stages and their parents as a picture: columns from left to right, an arrow from each parent to its child."""

from __future__ import annotations

from html import escape

from voco.report.outputs import World
from voco.report.table import seconds_text

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 152, 56, 44, 14, 6


def flow_picture(world: World) -> str:
    """Inline SVG. Parents that are gone are dashed; an arrow is left out where a longer way leads to the same stage."""
    parents = {output.uri: [parent.uri for parent in output.parents] for output in world.outputs}
    for uri in [uri for found in list(parents.values()) for uri in found]:
        parents.setdefault(uri, [])
    columns = _columns(parents)
    place = {
        uri: (MARGIN + column * (BOX_WIDTH + GAP_X), MARGIN + row * (BOX_HEIGHT + GAP_Y))
        for column, uris in enumerate(columns)
        for row, uri in enumerate(uris)
    }
    arrows = [_arrow(place[parent], place[uri]) for uri in parents for parent in _direct(uri, parents)]
    boxes = [_box(world, uri, *place[uri]) for uri in parents]
    width = 2 * MARGIN + len(columns) * (BOX_WIDTH + GAP_X) - GAP_X
    height = 2 * MARGIN + max(len(uris) for uris in columns) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    head = '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    head += '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
    return (
        f'<svg class="flow" viewBox="0 0 {width} {height}" style="max-width:{width}px;min-width:{0.75 * width:.0f}px" '
        'role="img" aria-label="flow of stages">'
        f"<title>Flow of stages</title>{head}{''.join(arrows + boxes)}</svg>"
    )


def _ancestors(uri: str, parents: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    todo = list(parents[uri])
    while todo:
        parent = todo.pop()
        if parent not in found:
            found.add(parent)
            todo += parents[parent]
    return found


def _direct(uri: str, parents: dict[str, list[str]]) -> list[str]:
    """The parents that are not also reached through another parent."""
    through = {far for parent in parents[uri] for far in _ancestors(parent, parents)}
    return [parent for parent in dict.fromkeys(parents[uri]) if parent not in through]


def _columns(parents: dict[str, list[str]]) -> list[list[str]]:
    """Stages by the longest way from a stage without parents; within a column near their parents' rows."""
    depth: dict[str, int] = {}

    def deep(uri: str) -> int:
        if uri not in depth:
            depth[uri] = 1 + max((deep(parent) for parent in parents[uri]), default=-1)
        return depth[uri]

    columns: list[list[str]] = [[] for _ in range(1 + max(deep(uri) for uri in parents))]
    row: dict[str, int] = {}
    for column in range(len(columns)):
        held = [uri for uri in parents if depth[uri] == column]
        if column:
            held.sort(key=lambda uri: sum(row[p] for p in _direct(uri, parents)) / max(1, len(_direct(uri, parents))))
        columns[column] = held
        row.update({uri: index for index, uri in enumerate(held)})
    return columns


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1 = start[0] + BOX_WIDTH, start[1] + BOX_HEIGHT / 2
    x2, y2 = end[0] - 3, end[1] + BOX_HEIGHT / 2
    bend = min(GAP_X, (x2 - x1) / 2)
    return f'<path class="arrow" marker-end="url(#tip)" d="M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"/>'


def _box(world: World, uri: str, x: float, y: float) -> str:
    output = world.at(uri)
    if output is None:
        name, detail, kind = uri.rstrip("/").rsplit("/", 1)[-1], "absent", "absent"
    else:
        name, detail, kind = output.name, f"{output.kind} · {seconds_text(output.manifest.seconds)}", f"kind-{output.kind}"
    shown = name if len(name) <= 18 else name[:17] + "…"
    return (
        f'<g class="stage {escape(kind)}"><title>{escape(uri)}</title>'
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8"/>'
        f'<text class="stage-name" x="{x + 12}" y="{y + 25}">{escape(shown)}</text>'
        f'<text class="stage-detail" x="{x + 12}" y="{y + 44}">{escape(detail)}</text></g>'
    )
