"""One HTML file from any outputs: it carries its own style, plots and images, asks for nothing and runs no script."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from voco.report import flow_picture, table
from voco.report.answers_section import side_by_side
from voco.report.comparison import compare, headline
from voco.report.comparison_section import benchmark_section
from voco.report.frames_section import frames_section
from voco.report.ingest_section import ingest_section
from voco.report.outputs import OutputGraph, gather_outputs
from voco.report.sweep_section import sweep_section
from voco.report.training_section import training_section
from voco.store import storage

CONVERSATIONS_SHOWN = 3  # of each sample
LONGEST_TEXT = 600  # characters of one text


def write_report(outputs: list[str], to: str, title: str) -> str:
    """Write the report on `outputs` (of any kind, local or s3://) as one file at `to`, and return `to`.

    The stages of a flow, the trials of a sweep and the parents of every output are found and shown too. What is missing is
    written as missing. Raises Refused when nothing is finished.
    """
    storage.write_bytes(to, render_page(gather_outputs(outputs), title).encode())
    return to


def render_page(world: OutputGraph, title: str) -> str:
    """The whole page as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "percent": table.percent,
        "span": table.interval_text,
        "bytes": table.bytes_text,
        "duration": table.seconds_text,
        "flops": table.flops_text,
        "short": _short,
        "number": _number,
    }
    comparisons = compare(world)
    return environment.get_template("report.html").render(
        title=title,
        world=world,
        picture=Markup(flow_picture.flow_picture(world)),
        headlines=[headline(comparison) for comparison in comparisons],
        ingests=[ingest_section(output) for output in world.of_kind("ingest")],
        training=training_section(world),
        sweeps=[sweep_section(output) for output in world.of_kind("sweep")],
        frame_caches=[frames_section(output) for output in world.of_kind("frame_cache")],
        comparisons=[benchmark_section(comparison) for comparison in comparisons],
        answers=[(comparison, *side_by_side(world, comparison)) for comparison in comparisons],
        unscored=[output.name for output in world.of_kind("evaluate") if output.read("scores") is None],
        conversations_shown=CONVERSATIONS_SHOWN,
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def _number(value: object) -> str:
    """A figure of a manifest, as it stands there apart from its digits being grouped."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"
