"""The extension points: one table each, plain data, so that a job file is checked without importing what it names.

A row says what checking and planning need to know. The implementation is the file of the row's name in the room that owns the
table, or the module that the row names. Other packages add rows by entry points in the groups `voco.formats`, `voco.methods`,
`voco.metrics`, `voco.attention`, `voco.chat_templates` and `voco.stages` (docs/extending.md). An entry point's name is the
row's; its value is the module of the implementation, or `module:ROW` for a row with other facts than the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TypeVar

Row = TypeVar("Row")


def with_entry_points(
    table: str, rows: Mapping[str, Row], default_row: Callable[[str, str], Row] | None = None
) -> dict[str, Row]:
    """The table's own rows and those that installed packages add. A package cannot replace a row.

    `default_row(name, module)` makes the row of an entry point that only names a module, which is then not imported.
    """
    added = {}
    for point in entry_points(group=f"voco.{table}"):
        has_row = bool(point.attr) or default_row is None
        added[point.name] = point.load() if has_row else default_row(point.name, point.module)  # type: ignore[misc]
    return dict(rows) | {name: row for name, row in added.items() if name not in rows}


@dataclass(frozen=True)
class FormatRow:
    """A source format: `ingest/formats/NAME.py` or `module`, which ends in `FORMAT`."""

    module: str | None = None


@dataclass(frozen=True)
class MethodRow:
    """A compression method: `methods/NAME.py` or `module`, which ends in `METHOD`."""

    label: str  # in tables and plots
    pooled: bool = False  # N vectors fill a view's slots instead of V, and no <voco> follows them
    views_apart: bool = False  # the VoCo mask: a view sees itself only and text sees only <voco>; False: plain causal
    uncompressed: bool = False  # text sees every vision token: the upper bound, which others are read against
    trains: bool = True  # False: a way to read an uncompressed checkpoint, `evaluate.read_as`
    module: str | None = None


@dataclass(frozen=True)
class MetricRow:
    """A benchmark's rule: `evaluate/metrics/NAME.py` or `module`, which ends in `METRIC`."""

    module: str | None = None


@dataclass(frozen=True)
class AttentionRow:
    """An attention backend: `model/attention/NAME.py` or `module`, which ends in `BACKEND`."""

    trains_on_cpu: bool = True
    precisions: tuple[str, ...] = ("bf16", "fp32")
    narrowest_head: int = 1  # the least head width that its kernel takes
    module: str | None = None


FORMATS = with_entry_points(
    "formats",
    {
        "llava_json": FormatRow(),
        "webvid_csv": FormatRow(),
        "video_chatgpt": FormatRow(),
        "webdataset": FormatRow(),
        "cc3m_tsv": FormatRow(),
        "question_jsonl": FormatRow(),
        "video_qa": FormatRow(),
        "mmbench_tsv": FormatRow(),
        "scienceqa": FormatRow(),
        "seed_json": FormatRow(),
    },
    lambda _name, module: FormatRow(module),
)

METHODS = with_entry_points(
    "methods",
    {
        "voco": MethodRow("VoCo", views_apart=True),
        "none": MethodRow("uncompressed", uncompressed=True),
        "avg_pool": MethodRow("average pooling", pooled=True),
        "q_former": MethodRow("Q-Former", pooled=True),
        "fastv": MethodRow("FastV", trains=False),
    },
    lambda name, module: MethodRow(name, module=module),
)

METRICS = with_entry_points("metrics", {"gqa": MetricRow()}, lambda _name, module: MetricRow(module))

ATTENTION = with_entry_points(
    "attention",
    {
        "segments": AttentionRow(),
        "dense": AttentionRow(),
        "varlen": AttentionRow(trains_on_cpu=False, precisions=("bf16",)),
        "flex": AttentionRow(trains_on_cpu=False, narrowest_head=16),
    },
    lambda _name, module: AttentionRow(module=module),
)
