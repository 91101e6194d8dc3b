"""The paper's tables 1, 2 and 4 (VoCo-LLaMA, CVPR 2025) with our figures of the same benchmark, method and N beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

from voco.job.benchmarks import known_benchmark
from voco.job.tables import METHODS
from voco.report.comparison import Comparison
from voco.report.outputs import Output, OutputGraph

UPPER, LOWER = "upper", "lower"  # roles of the bounds, which have no N
# Columns of table 1, by the benchmarks' names in `job/benchmarks.py`
COLUMNS = {
    "gqa": "GQA", "mmbench": "MMBench", "mme": "MME", "pope": "POPE", "seed": "SEED", "seedbench": "SEED", "scienceqa": "SQA-I",
    "sqa": "SQA-I", "vqav2": "VQAv2",
}  # fmt: skip
SUMS = {"MME"}  # a sum of subtasks; the others are percentages
TABLE_1 = {  # by method and N: GQA, MMBench, MME, POPE, SEED, SQA-I, VQAv2
    (UPPER, 0): (61.1, 64.0, 1487.2, 85.0, 57.9, 66.5, 77.7),
    ("voco", 1): (57.0, 58.8, 1323.3, 81.4, 53.7, 65.4, 72.3),
    ("avg_pool", 1): (52.9, 55.5, 1210.3, 79.1, 50.3, 62.2, 65.0),
    ("q_former", 1): (51.1, 51.7, 1079.7, 77.3, 47.2, 62.7, 63.4),
    (LOWER, 0): (37.7, 22.3, 617.3, 53.9, 36.9, 60.7, 41.2),
}
ORDER_1 = ("GQA", "MMBench", "MME", "POPE", "SEED", "SQA-I", "VQAv2")
ORDER_2 = ("MMBench", "GQA", "VQAv2", "SEED")  # of tables 2 and 4
TABLE_2 = {
    128: (61.0, 59.8, 76.9, 59.1), 64: (60.5, 60.4, 75.4, 56.3), 32: (59.4, 60.2, 75.3, 56.2), 16: (58.6, 59.4, 75.4, 56.2),
    8: (58.7, 59.2, 75.3, 56.3), 4: (60.4, 58.4, 74.5, 56.0), 2: (60.1, 57.7, 73.5, 55.0),
}  # fmt: skip
TABLE_4 = {16: (58.3, 58.9, 74.9, 55.8), 4: (59.7, 58.0, 73.5, 55.2), 1: (57.9, 56.1, 71.2, 53.0)}  # trained with N = 32


class PaperRow(NamedTuple):
    """A figure of the paper and ours: in percent, for MME a sum; None where it is missing. Retention as in table 1."""

    table: int
    benchmark: str
    method: str
    tokens: int  # N; 0 for a bound
    paper: float
    paper_retention: float | None
    figure: float | None
    retention: float | None

    @property
    def label(self) -> str:
        return METHODS[self.method].label if self.method in METHODS else self.method


EvaluatedFigures = dict[tuple[str, str, int, bool], float]  # by benchmark, method, N, and whether it was trained with more tokens


def paper_rows(ours_by_key: EvaluatedFigures) -> list[PaperRow]:
    """A row for each figure of the paper about a benchmark that is in `ours_by_key`."""
    evaluated = {benchmark for benchmark, *_ in ours_by_key}
    rows = [
        _row(1, ours_by_key, *key, name, value) for key, row in TABLE_1.items() for name, value in zip(ORDER_1, row, strict=True)
    ]
    for table, figures in ((2, TABLE_2), (4, TABLE_4)):
        for tokens, values in figures.items():
            rows += [_row(table, ours_by_key, "voco", tokens, name, value) for name, value in zip(ORDER_2, values, strict=True)]
    return sorted((row for row in rows if row.benchmark in evaluated), key=lambda row: (row.table, ORDER_1.index(row.benchmark)))


def _row(table: int, ours_by_key: EvaluatedFigures, method: str, tokens: int, benchmark: str, paper: float) -> PaperRow:
    column = ORDER_1.index(benchmark)
    lower, upper = (TABLE_1[(role, 0)][column] for role in (LOWER, UPPER))
    own_lower, own_upper = (ours_by_key.get((benchmark, role, 0, False)) for role in (LOWER, UPPER))
    figure = ours_by_key.get((benchmark, method, tokens, table == 4))
    rates = retained(paper, lower, upper), retained(figure, own_lower, own_upper)
    return PaperRow(table, benchmark, method, tokens, paper, rates[0], figure, rates[1])


def retained(figure: float | None, lower: float | None, upper: float | None) -> float | None:
    """(figure - lower) / (upper - lower), in percent; None without both bounds, and where they do not differ."""
    if figure is None or lower is None or upper is None or upper <= lower:
        return None
    return 100 * (figure - lower) / (upper - lower)


def evaluated_figures(graph: OutputGraph, comparisons: list[Comparison]) -> EvaluatedFigures:
    """The set's official figure of each evaluation, or the mean mark where that is the official one."""
    ours_by_key: EvaluatedFigures = {}
    outputs = {output.uri: output for output in graph.of_kind("evaluate")}
    for comparison in comparisons:
        benchmark = COLUMNS.get(known_benchmark(comparison.benchmark))
        for row in comparison.rows if benchmark is not None else []:
            output, tokens = outputs[row["output"]], int(row["n"])
            fewer = _trained_tokens(output) > tokens
            key = (row["role"], 0, False) if row["role"] in (UPPER, LOWER) else (row["method"], tokens, fewer)
            figure = _official_figure(output, tokens)
            scale = 1 if benchmark in SUMS and figure is not None else 100
            ours_by_key[(str(benchmark), *key)] = scale * (row["score"] if figure is None else figure)
    return ours_by_key


def _official_figure(output: Output, tokens: int) -> float | None:
    official: dict[str, Any] = output.manifest.statistics.get("official", {})
    figures: dict[str, float] = official.get("figures", {}).get(str(tokens), {})
    return figures.get(official.get("headline", ""))


def _trained_tokens(output: Output) -> int:
    """The largest N that the evaluation read: `evaluate.tokens` are read from one compression of the largest."""
    listed = output.job.get("evaluate", {}).get("tokens") or [0]
    return int(max(listed))
