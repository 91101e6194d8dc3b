"""The stages and their parents as a picture: layers from top to bottom, an arrow from each parent to its child."""

from __future__ import annotations

import itertools
from html import escape

from voco.report.flow_layout import FlowLayout, Point, layout_flow
from voco.report.outputs import Output, OutputGraph
from voco.report.table import seconds_text

BOX_WIDTH, BOX_HEIGHT, LINE = 166.0, 52.0, 16.0
TRIALS_SHOWN = 12


def flow_picture(world: OutputGraph) -> str:
    """Inline SVG. A sweep is one box with its trials in it, parents that are gone are dashed.

    An arrow is left out where a longer way leads to the same stage, and for tables whose words alone are read.
    """
    parents = _parents(world)
    trials = {output.uri: _trials(world, output) for output in world.of_kind("sweep")}
    heights = {uri: BOX_HEIGHT + (LINE * len(trials[uri]) + 6 if trials.get(uri) else 0) for uri in parents}
    drawing = layout_flow(parents, BOX_WIDTH, heights)
    boxes = [_box(world, uri, place, heights[uri], trials.get(uri, [])) for uri, place in drawing.boxes.items()]
    head = '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    head += '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
    return (
        f'<svg class="flow" viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}" '
        f'style="max-width:{drawing.width:.0f}px;min-width:{0.68 * drawing.width:.0f}px" '
        'role="img" aria-label="flow of stages">'
        f"<title>Flow of stages</title>{head}{_arrows(drawing)}{''.join(boxes)}</svg>"
    )


def _parents(world: OutputGraph) -> dict[str, list[str]]:
    """The parents of each box; what a sweep's trials read is read by the sweep, and what they made is made by it."""

    def box(uri: str) -> str:
        found = world.sweep_of(uri)
        return uri if found is None else found[0].uri

    parents: dict[str, list[str]] = {}
    for output in world.outputs:
        words = output.text_only_inputs()
        mine = parents.setdefault(box(output.uri), [])
        mine += [box(parent.uri) for parent in output.parents if parent.uri not in words]
    for uri in [uri for found in list(parents.values()) for uri in found]:
        parents.setdefault(uri, [])
    return {uri: [parent for parent in dict.fromkeys(found) if parent != uri] for uri, found in parents.items()}


def _trials(world: OutputGraph, sweep: Output) -> list[tuple[str, str]]:
    """Each trial's name and how long it trained; the last line says how many more there are."""
    found = [(name, seconds_text(output.manifest.seconds)) for name, output in world.trials(sweep)]
    more = len(found) - TRIALS_SHOWN
    return found if more <= 0 else [*found[:TRIALS_SHOWN], (f"and {more} more", "")]


def _arrows(drawing: FlowLayout) -> str:
    return "".join(f'<path class="arrow" marker-end="url(#tip)" d="{_path(points)}"/>' for points in drawing.arrows)


def _path(points: list[Point]) -> str:
    """Straight down past a layer, curves between layers."""
    text = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for index, ((x1, y1), (x2, y2)) in enumerate(itertools.pairwise(points)):
        if index % 2 == 0:  # to the lower edge of a layer, from a box's or from the upper
            text += f"L{x2:.1f} {y2:.1f}"
            continue
        end = y2 - 2 if index == len(points) - 2 else y2
        bend = (end - y1) / 2
        text += f"C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {end - bend:.1f} {x2:.1f} {end:.1f}"
    return text


def _box(world: OutputGraph, uri: str, place: Point, height: float, trials: list[tuple[str, str]]) -> str:
    output = world.at(uri)
    x, y = place
    if output is None:
        name, detail, kind = uri.rstrip("/").rsplit("/", 1)[-1], "absent", "absent"
    else:
        name, detail, kind = output.name, f"{output.kind} · {seconds_text(output.manifest.seconds)}", f"kind-{output.kind}"
    lines = ""
    for index, (trial, seconds) in enumerate(trials):
        down = y + BOX_HEIGHT + LINE * index + 8
        lines += f'<text class="stage-detail" x="{x + 12:.1f}" y="{down:.1f}">{escape(_short(trial, 14))}</text>'
        right = x + BOX_WIDTH - 12
        lines += f'<text class="stage-detail" x="{right:.1f}" y="{down:.1f}" text-anchor="end">{escape(seconds)}</text>'
    return (
        f'<g class="stage {escape(kind)}"><title>{escape(uri)}</title>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH:g}" height="{height:g}" rx="8"/>'
        f'<text class="stage-name" x="{x + 12:.1f}" y="{y + 22:.1f}">{escape(_short(name, 18))}</text>'
        f'<text class="stage-detail" x="{x + 12:.1f}" y="{y + 40:.1f}">{escape(detail)}</text>{lines}</g>'
    )


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
