"""Renders the report as one HTML file. It contains its style, plots and images, loads nothing and runs no script."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from voco.report import flow_picture, plots, table
from voco.report.answers_section import side_by_side
from voco.report.comparison import compare, headline
from voco.report.comparison_section import benchmark_section
from voco.report.frames_section import frames_section
from voco.report.ingest_section import ingest_section
from voco.report.judged import RESOLUTIONS, read_judged_figures, video_rows
from voco.report.outputs import OutputGraph, gather_outputs
from voco.report.paper import evaluated_figures, paper_rows
from voco.report.sweep_section import sweep_section
from voco.report.training_section import training_section
from voco.store import storage

CONVERSATIONS_SHOWN = 3  # per sample
FACTS_SHOWN = 40  # single statistics of an ingest output
LONGEST_TEXT = 600  # characters shown of a text


def write_report(outputs: list[str], to: str, title: str) -> str:
    """Write the report on `outputs` (of any kind, local or s3://) as one file at `to`, and return `to`.

    Includes the stages of flows, the trials of sweeps and the parents of all outputs. Missing pieces are shown as missing.
    Raises Refused when none of the outputs is finished.
    """
    storage.write_bytes(to, render_page(gather_outputs(outputs), title).encode())
    return to


def render_page(graph: OutputGraph, title: str) -> str:
    """The page as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "percent": table.percent,
        "span": table.interval_text,
        "official": table.official_text,
        "official_span": table.official_span,
        "bytes": table.bytes_text,
        "duration": table.seconds_text,
        "flops": table.flops_text,
        "short": _short,
        "number": _number,
    }
    environment.globals["colours"] = plots.COLOURS
    comparisons = compare(graph)
    judged = read_judged_figures(graph, comparisons)
    return environment.get_template("report.html").render(
        title=title,
        graph=graph,
        picture=Markup(flow_picture.flow_picture(graph)),
        headlines=[headline(comparison) for comparison in comparisons],
        ingests=[ingest_section(output) for output in graph.of_kind("ingest")],
        training=training_section(graph),
        sweeps=[sweep_section(output) for output in graph.of_kind("sweep")],
        frame_caches=[frames_section(output) for output in graph.of_kind("frame_cache")],
        comparisons=[benchmark_section(comparison) for comparison in comparisons],
        judged=judged,
        videos=video_rows(comparisons, judged),
        resolutions=RESOLUTIONS,
        paper=paper_rows(evaluated_figures(graph, comparisons)),
        answers=[(comparison, *side_by_side(graph, comparison)) for comparison in comparisons],
        unscored=[output.name for output in graph.of_kind("evaluate") if output.read("scores") is None],
        conversations_shown=CONVERSATIONS_SHOWN,
        facts_shown=FACTS_SHOWN,
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def _number(value: object) -> str:
    """A number of a manifest with grouped digits; anything else unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"
