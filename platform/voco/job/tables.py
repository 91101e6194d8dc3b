"""The extension points: one table each, plain data, so that a job file is checked without importing what it names.

A row says what checking and planning need to know. The implementation is the file of the row's name in the room that owns the
table, or the module that the row names. Other packages add rows by entry points in the groups `voco.formats`, `voco.methods`,
`voco.metrics`, `voco.attention`, `voco.chat_templates` and `voco.stages` (docs/extending.md). An entry point's name is the
row's; its value is the module of the implementation, or `module:ROW` for a row with other facts than the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar, cast

from voco.errors import Refused, one_line

Row = TypeVar("Row")
Implementation = TypeVar("Implementation")
ENTRY_POINTS = entry_points()  # of every installed package


class Table(dict[str, Row]):
    """The rows of an extension point by name: its own and those of installed packages, which cannot replace built-in ones.

    A package's row that cannot be used is not in the table. `BROKEN` has the reason, for jobs that name it; others run.
    """

    def __init__(
        self, name: str, rows: Mapping[str, Row], row_type: type[Row], default_row: Callable[[str, str], Row] | None = None
    ) -> None:
        super().__init__(rows)
        self.name = name
        points: dict[str, list[EntryPoint]] = {}
        for point in ENTRY_POINTS.select(group=f"voco.{name}"):
            if point.name not in rows and point.value not in [other.value for other in points.get(point.name, [])]:
                points.setdefault(point.name, []).append(point)
        for row_name, same_name in points.items():
            try:
                self[row_name] = _package_row(same_name, row_type, default_row)
            except Exception as error:  # noqa: BLE001 - whatever the import of a package raises
                self.reject(row_name, ", ".join(sorted(map(_package, same_name))), one_line(error))

    def __missing__(self, row_name: str) -> Row:
        raise Refused(f"{self.name}: expected one of {', '.join(self)}, got {row_name}{broken_hint(row_name)}")

    def reject(self, row_name: str, package: str, reason: str) -> None:
        """Take a package's row out of the table. `BROKEN` keeps the reason."""
        self.pop(row_name, None)
        BROKEN[row_name] = f"voco.{self.name} of {package} cannot be used: {reason}"

    def implementation(self, row_name: str, package: str, attribute: str, kind: type[Implementation]) -> Implementation:
        """What the module of a row ends in: `NAME.py` of `package`, or the row's `module`. No other row's module is imported.

        Raises Refused with one line for a package's module that cannot be used, and for a name without a row.
        """
        module: str | None = getattr(self[row_name], "module", None)
        if module is None:
            return cast(Implementation, getattr(import_module(f"{package}.{row_name}"), attribute))
        try:
            implementation = getattr(import_module(module), attribute)
        except Exception as error:  # whatever the import of a package raises
            raise Refused(f"{self.name}: {row_name}: module {module}: {one_line(error)}") from error
        if not isinstance(implementation, kind):
            got = f"got {type(implementation).__name__}"
            raise Refused(f"{self.name}: {row_name}: module {module}: expected {attribute} of type {kind.__name__}, {got}")
        return implementation


BROKEN: dict[str, str] = {}  # name of a row -> the package that adds it, and the reason why it cannot be used


def broken_hint(row_name: str) -> str:
    """`; ...`: the reason why an installed package's row of this name cannot be used; else nothing."""
    return f"; {BROKEN[row_name]}" if row_name in BROKEN else ""


def _package_row(points: list[EntryPoint], row_type: type[Row], default_row: Callable[[str, str], Row] | None) -> Row:
    if len(points) > 1:
        raise ValueError("several packages add this name")
    point = points[0]
    if not point.attr and default_row is not None:
        return default_row(point.name, point.module)
    row = point.load()
    if not isinstance(row, row_type):
        raise TypeError(f"{point.value}: expected a {row_type.__name__}, got {type(row).__name__}")
    return row


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package"


@dataclass(frozen=True)
class FormatRow:
    """A source format: `ingest/formats/NAME.py` or `module`, which ends in `FORMAT`."""

    module: str | None = None
    videos: bool = False  # its media are videos, for the costs of `voco plan`


@dataclass(frozen=True)
class MethodRow:
    """A compression method: `methods/NAME.py` or `module`, which ends in `METHOD`."""

    label: str  # in tables and plots
    pooled: bool = False  # N vectors fill a view's slots instead of V, and no <voco> follows them
    views_apart: bool = False  # the VoCo mask: a view sees itself only and text sees only <voco>; False: plain causal
    uncompressed: bool = False  # text sees every vision token: the upper bound, which others are compared with
    trains: bool = True  # False: FastV, a way to read an uncompressed checkpoint (`evaluate.read_as`)
    module: str | None = None


@dataclass(frozen=True)
class MetricRow:
    """A benchmark's metric: `evaluate/metrics/NAME.py` or `module`, which ends in `METRIC`."""

    module: str | None = None


@dataclass(frozen=True)
class AttentionRow:
    """An attention backend: `model/attention/NAME.py` or `module`, which ends in `BACKEND`."""

    trains_on_cpu: bool = True
    precisions: tuple[str, ...] = ("bf16", "fp32")
    narrowest_head: int = 1  # the smallest head width that its kernel takes
    module: str | None = None


FORMATS = Table(
    "formats",
    {
        "llava_json": FormatRow(),
        "chat_json": FormatRow(),
        "parquet": FormatRow(),
        "webvid_csv": FormatRow(videos=True),
        "video_chatgpt": FormatRow(videos=True),
        "webdataset": FormatRow(),
        "cc3m_tsv": FormatRow(),
        "question_jsonl": FormatRow(),
        "video_qa": FormatRow(videos=True),
        "mmbench_tsv": FormatRow(),
        "scienceqa": FormatRow(),
        "seed_json": FormatRow(),
        "refcoco": FormatRow(),
    },
    FormatRow,
    lambda _name, module: FormatRow(module),
)

METHODS = Table(
    "methods",
    {
        "voco": MethodRow("VoCo", views_apart=True),
        "none": MethodRow("uncompressed", uncompressed=True),
        "avg_pool": MethodRow("average pooling", pooled=True),
        "q_former": MethodRow("Q-Former", pooled=True),
        "fastv": MethodRow("FastV", trains=False),
    },
    MethodRow,
    lambda name, module: MethodRow(name, module=module),
)

METRICS = Table(
    "metrics",
    {
        "gqa": MetricRow(),
        "vqa": MetricRow(),
        "vqa_llava": MetricRow(),
        "textvqa": MetricRow(),
        "pope": MetricRow(),
        "mme": MetricRow(),
        "mmbench": MetricRow(),
        "seed": MetricRow(),
        "scienceqa": MetricRow(),
        "letter_strict": MetricRow(),
        "letter_lenient": MetricRow(),
        "exact": MetricRow(),
        "token_f1": MetricRow(),
        "box_iou": MetricRow(),
    },
    MetricRow,
    lambda _name, module: MetricRow(module),
)

AUTO = "auto"  # as `attention`: the fastest backend that a worker's GPU has (model/attention/plan.py), else segments
ATTENTION = Table(
    "attention",
    {
        "segments": AttentionRow(),
        "dense": AttentionRow(),
        "varlen": AttentionRow(trains_on_cpu=False, precisions=("bf16",)),
        "flex": AttentionRow(trains_on_cpu=False, narrowest_head=16),
    },
    AttentionRow,
    lambda _name, module: AttentionRow(module=module),
)
