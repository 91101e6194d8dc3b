"""The paper's tables 1 to 4 (VoCo-LLaMA, CVPR 2025) with our figures of the same benchmark, method and N beside them."""

from __future__ import annotations

import re
from typing import NamedTuple

from voco.job.benchmarks import known_benchmark
from voco.job.tables import METHODS
from voco.report.comparison import Comparison
from voco.report.outputs import Output, OutputGraph
from voco.report.table import SUMS

UPPER, LOWER = "upper", "lower"  # roles of the bounds, which have no N
# Columns of table 1, by the benchmarks' names in `job/benchmarks.py`
COLUMNS = {
    "gqa": "GQA", "mmbench": "MMBench", "mme": "MME", "pope": "POPE", "seed": "SEED", "seedbench": "SEED", "scienceqa": "SQA-I",
    "sqa": "SQA-I", "vqav2": "VQAv2",
    "textvqa": "TextVQA",
}  # fmt: skip
# Words of a benchmark's name by which it is a part of the set, or another language: its figure is not the paper's
PART_OF_SET = {
    "adversarial", "cn", "lite", "mini", "popular", "random", "subset", "tiny", "train", "video", "videos",
}  # fmt: skip
TABLE_1 = {  # by method and N: GQA, MMBench, MME, POPE, SEED, SQA-I, VQAv2
    (UPPER, 0): (61.1, 64.0, 1487.2, 85.0, 57.9, 66.5, 77.7),
    ("voco", 1): (57.0, 58.8, 1323.3, 81.4, 53.7, 65.4, 72.3),
    ("avg_pool", 1): (52.9, 55.5, 1210.3, 79.1, 50.3, 62.2, 65.0),
    ("q_former", 1): (51.1, 51.7, 1079.7, 77.3, 47.2, 62.7, 63.4),
    (LOWER, 0): (37.7, 22.3, 617.3, 53.9, 36.9, 60.7, 41.2),
}
ORDER_1 = ("GQA", "MMBench", "MME", "POPE", "SEED", "SQA-I", "VQAv2")
ORDER = (*ORDER_1, "TextVQA")
ORDER_2 = ("MMBench", "GQA", "VQAv2", "SEED")  # of tables 2 and 4
TABLE_2 = {
    128: (61.0, 59.8, 76.9, 59.1), 64: (60.5, 60.4, 75.4, 56.3), 32: (59.4, 60.2, 75.3, 56.2), 16: (58.6, 59.4, 75.4, 56.2),
    8: (58.7, 59.2, 75.3, 56.3), 4: (60.4, 58.4, 74.5, 56.0), 2: (60.1, 57.7, 73.5, 55.0),
}  # fmt: skip
ORDER_3 = ("GQA", "POPE", "SQA-I", "TextVQA")
LLAMA_VID = "LLaMA-VID"  # N content tokens and a context token
# 224 pixels and EVA-G, which no checkpoint of ours has: only the paper's side. It prints no bounds for this encoder.
TABLE_3 = {
    (LLAMA_VID, 16): (58.2, 83.1, 67.4, 50.8), (LLAMA_VID, 4): (56.2, 83.5, 68.7, 49.1), (LLAMA_VID, 1): (55.5, 83.1, 68.8, 49.0),
    ("voco", 1): (58.3, 85.0, 69.5, 52.7),
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


class Evaluated(NamedTuple):
    """A published figure of ours, in percent or a sum, and its retention in percent, where the evaluation had bounds."""

    figure: float
    retention: float | None = None


# By benchmark, method, N, and whether it was trained with more tokens
EvaluatedFigures = dict[tuple[str, str, int, bool], Evaluated]


def paper_rows(ours_by_key: EvaluatedFigures) -> list[PaperRow]:
    """A row for each figure of the paper about a benchmark that is in `ours_by_key`."""
    evaluated = {benchmark for benchmark, *_ in ours_by_key}
    rows = [
        _row(1, ours_by_key, *key, name, value) for key, row in TABLE_1.items() for name, value in zip(ORDER_1, row, strict=True)
    ]
    for table, figures in ((2, TABLE_2), (4, TABLE_4)):
        for tokens, values in figures.items():
            rows += [_row(table, ours_by_key, "voco", tokens, name, value) for name, value in zip(ORDER_2, values, strict=True)]
    for (method, tokens), values in TABLE_3.items():
        pairs = zip(ORDER_3, values, strict=True)
        rows += [PaperRow(3, name, method, tokens, value, None, None, None) for name, value in pairs]
    return sorted((row for row in rows if row.benchmark in evaluated), key=lambda row: (row.table, ORDER.index(row.benchmark)))


def _row(table: int, ours_by_key: EvaluatedFigures, method: str, tokens: int, benchmark: str, paper: float) -> PaperRow:
    column = ORDER_1.index(benchmark)
    lower, upper = (TABLE_1[(role, 0)][column] for role in (LOWER, UPPER))
    bounds = [ours_by_key.get((benchmark, role, 0, False)) for role in (LOWER, UPPER)]
    own_lower, own_upper = (None if bound is None else bound.figure for bound in bounds)
    figure, rate = ours_by_key.get((benchmark, method, tokens, table == 4)) or (None, None)
    rate = retained(figure, own_lower, own_upper) if rate is None else rate
    return PaperRow(table, benchmark, method, tokens, paper, retained(paper, lower, upper), figure, rate)


def retained(figure: float | None, lower: float | None, upper: float | None) -> float | None:
    """(figure - lower) / (upper - lower), in percent; None without both bounds, and where they do not differ."""
    if figure is None or lower is None or upper is None or upper <= lower:
        return None
    return 100 * (figure - lower) / (upper - lower)


def evaluated_figures(graph: OutputGraph, comparisons: list[Comparison]) -> EvaluatedFigures:
    """The published figure of each evaluation of a whole set: none of `evaluate.limit`, of a category or of a language."""
    ours_by_key: EvaluatedFigures = {}
    outputs = {output.uri: output for output in graph.of_kind("evaluate")}
    for comparison in comparisons:
        benchmark = whole_set(comparison.benchmark)
        for row in comparison.rows if benchmark is not None else []:
            output, tokens = outputs[row["output"]], int(row["n"])
            if row["official"] is None or output.job.get("evaluate", {}).get("limit") is not None:
                continue
            fewer = _trained_tokens(output) > tokens
            key = (row["role"], 0, False) if row["role"] in (UPPER, LOWER) else (row["method"], tokens, fewer)
            rate = None if row["retention"] is None else 100 * row["retention"]
            figure = row["official"] if row["official_name"] in SUMS else 100 * row["official"]
            ours_by_key[(str(benchmark), *key)] = Evaluated(figure, rate)
    return ours_by_key


def whole_set(benchmark: str) -> str | None:
    """The paper's name of a benchmark; None for a set that it does not have, and for a part of one."""
    return None if PART_OF_SET & set(re.findall("[a-z]+", benchmark.lower())) else COLUMNS.get(known_benchmark(benchmark))


def _trained_tokens(output: Output) -> int:
    """The largest N that the evaluation read: `evaluate.tokens` are read from one compression of the largest."""
    listed = output.job.get("evaluate", {}).get("tokens") or [0]
    return int(max(listed))
