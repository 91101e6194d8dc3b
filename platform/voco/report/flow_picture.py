"""The stages and their parents as an SVG: layers from top to bottom, an arrow from each parent to its child."""

from __future__ import annotations

import itertools
from html import escape

from voco.report import plots
from voco.report.flow_layout import Coordinates, FlowLayout, layout_flow
from voco.report.outputs import Output, OutputGraph
from voco.report.table import seconds_text

BOX_WIDTH, BOX_HEIGHT, LINE_HEIGHT = 166.0, 52.0, 16.0
TRIALS_SHOWN = 12


def flow_picture(graph: OutputGraph) -> str:
    """Inline SVG. A sweep is one box that lists its trials; a parent that no longer exists has a dashed box.

    There is no arrow where a longer path leads to the same stage, nor for inputs that only add words to a tokenizer.
    """
    parents = _parents(graph)
    trials = {output.uri: _trials(graph, output) for output in graph.of_kind("sweep")}
    heights = {uri: BOX_HEIGHT + (LINE_HEIGHT * len(trials[uri]) + 6 if trials.get(uri) else 0) for uri in parents}
    layout = layout_flow(parents, BOX_WIDTH, heights)
    boxes = [_box(graph, uri, corner, heights[uri], trials.get(uri, [])) for uri, corner in layout.boxes.items()]
    head = '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    head += '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
    return (
        f'<svg class="flow" viewBox="0 0 {layout.width:.0f} {layout.height:.0f}" '
        f'style="max-width:{layout.width:.0f}px;min-width:{0.68 * layout.width:.0f}px" '
        'role="img" aria-label="flow of stages">'
        f"<title>Flow of stages</title>{head}{_arrows(layout)}{''.join(boxes)}</svg>"
    )


def _parents(graph: OutputGraph) -> dict[str, list[str]]:
    """The parents of each box. The inputs and outputs of a sweep's trials count as the sweep's."""

    def box(uri: str) -> str:
        trial = graph.sweep_of(uri)
        return uri if trial is None else trial[0].uri

    parents: dict[str, list[str]] = {}
    for output in graph.outputs:
        text_only = output.text_only_inputs()
        box_parents = parents.setdefault(box(output.uri), [])
        box_parents += [box(parent.uri) for parent in output.parents if parent.uri not in text_only]
    for uri in [uri for uris in list(parents.values()) for uri in uris]:
        parents.setdefault(uri, [])
    return {uri: [parent for parent in dict.fromkeys(uris) if parent != uri] for uri, uris in parents.items()}


def _trials(graph: OutputGraph, sweep: Output) -> list[tuple[str, str]]:
    """Name and training time of each trial; a last line counts those left out."""
    lines = [(name, seconds_text(output.manifest.seconds)) for name, output in graph.trials(sweep)]
    left_out = len(lines) - TRIALS_SHOWN
    return lines if left_out <= 0 else [*lines[:TRIALS_SHOWN], (f"and {left_out} more", "")]


def _arrows(layout: FlowLayout) -> str:
    return "".join(f'<path class="arrow" marker-end="url(#tip)" d="{_path(points)}"/>' for points in layout.arrows)


def _path(points: list[Coordinates]) -> str:
    """Straight down past a layer, curves between layers."""
    text = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for index, ((x1, y1), (x2, y2)) in enumerate(itertools.pairwise(points)):
        if index % 2 == 0:  # down to the bottom edge of a layer
            text += f"L{x2:.1f} {y2:.1f}"
            continue
        end = y2 - 2 if index == len(points) - 2 else y2
        bend = (end - y1) / 2
        text += f"C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {end - bend:.1f} {x2:.1f} {end:.1f}"
    return text


def _box(graph: OutputGraph, uri: str, corner: Coordinates, height: float, trials: list[tuple[str, str]]) -> str:
    output = graph.at(uri)
    x, y = corner
    if output is None:
        name, detail, kind = uri.rstrip("/").rsplit("/", 1)[-1], "absent", "absent"
    else:
        name, detail, kind = output.name, f"{output.kind} · {seconds_text(output.manifest.seconds)}", f"kind-{output.kind}"
    lines = ""
    for index, (trial, seconds) in enumerate(trials):
        baseline = y + BOX_HEIGHT + LINE_HEIGHT * index + 8
        lines += f'<text class="stage-detail" x="{x + 12:.1f}" y="{baseline:.1f}">{escape(plots.truncate(trial, 14))}</text>'
        right = x + BOX_WIDTH - 12
        lines += f'<text class="stage-detail" x="{right:.1f}" y="{baseline:.1f}" text-anchor="end">{escape(seconds)}</text>'
    return (
        f'<g class="stage {escape(kind)}"><title>{escape(uri)}</title>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH:g}" height="{height:g}" rx="8"/>'
        f'<text class="stage-name" x="{x + 12:.1f}" y="{y + 22:.1f}">{escape(plots.truncate(name, 18))}</text>'
        f'<text class="stage-detail" x="{x + 12:.1f}" y="{y + 40:.1f}">{escape(detail)}</text>{lines}</g>'
    )
