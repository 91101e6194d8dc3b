"""Judged figures: what `voco judge` wrote beside evaluations, and the paper's table 8 with ours beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

from voco.job.benchmarks import known_benchmark
from voco.report.comparison import Comparison
from voco.report.outputs import Output, OutputGraph
from voco.store import storage

VIDEO_SETS = {"msvdqa": "MSVD-QA", "msrvttqa": "MSRVTT-QA", "activitynetqa": "ActivityNet-QA"}
RESOLUTIONS = (224, 336)  # pixels, of CLIP-L
# VoCo-LLaMA's rows by tokens of a frame and pixels: accuracy % and score of 5, in the order of VIDEO_SETS
TABLE_8 = {
    (2, 224): ((72.3, 3.9), (61.1, 3.5), (47.9, 3.4)), (2, 336): ((72.6, 3.9), (61.2, 3.5), (47.9, 3.4)),
    (8, 224): ((73.4, 3.9), (62.0, 3.5), (48.5, 3.4)), (8, 336): ((73.5, 3.9), (62.3, 3.5), (48.6, 3.4)),
}  # fmt: skip


class JudgedFigure(NamedTuple):
    """One judge's figure of one evaluation at one N. Without `summary.json` the judging is not finished: no figures."""

    output: str
    label: str
    benchmark: str
    n: int | None
    judge: str
    dates: str  # of the first and the last verdict
    figures: dict[str, Any]  # `judged_figures` of evaluate/judge.py; empty when there is none
    problem: str  # why the figure is not to be used; empty when it is


class VideoRow(NamedTuple):
    """A video set at one N: the paper's judged figures by pixels, and ours; None where there is none."""

    benchmark: str
    tokens: int
    paper: tuple[tuple[float, float] | None, ...]  # accuracy % and score, for each of RESOLUTIONS
    label: str
    judged: JudgedFigure | None
    rule: str  # the metric of `score`, which is not the papers' figure
    score: float | None


def read_judged_figures(graph: OutputGraph, comparisons: list[Comparison]) -> list[JudgedFigure]:
    """The figures of every judge of every evaluation, in the order of the evaluations and of the judges' folders."""
    rows = {(row["output"], row["n"]): row for comparison in comparisons for row in comparison.rows}
    figures = []
    for output in graph.of_kind("evaluate"):
        top = storage.join(output.uri, "judge")
        for name in sorted(storage.list_names(top)):
            figures += _of_judge(output, storage.join(top, name), rows)
    return figures


def _of_judge(output: Output, folder: str, rows: dict[tuple[str, int], dict[str, Any]]) -> list[JudgedFigure]:
    summary, identity = storage.join(folder, "summary.json"), storage.join(folder, "judge.json")
    benchmark = str(output.job.get("evaluate", {}).get("benchmark", ""))
    if not storage.exists(summary):
        if not storage.exists(identity):
            return []
        judge = str(storage.read_json(identity)["judge"])
        return [JudgedFigure(output.uri, output.name, benchmark, None, judge, "", {}, "not finished: run voco judge again")]
    content = storage.read_json(summary)
    reported = ", ".join(content["reported_models"])
    judge = content["judge"] + (f" ({reported})" if reported and reported != content["judge"] else "")
    dates = " to ".join(dict.fromkeys(content[key][:10] for key in ("first_verdict", "last_verdict")))
    figures = []
    for figure in content["figures"]:
        row = rows.get((output.uri, figure["n"]))
        other = row is None or row["questions"] != figure["questions"]
        problem = "of other answers than these: run voco judge again" if other else ""
        label, set_name = (output.name, benchmark) if row is None else (row["label"], row["benchmark"])
        figures.append(JudgedFigure(output.uri, label, set_name, figure["n"], judge, dates, figure, problem))
    return figures


def video_rows(comparisons: list[Comparison], judged: list[JudgedFigure]) -> list[VideoRow]:
    """A row for each N of the paper and of ours, of every evaluated video set; several where there are several judges."""
    rows = []
    for comparison in comparisons:
        known = known_benchmark(comparison.benchmark)
        if known not in VIDEO_SETS:
            continue
        column = list(VIDEO_SETS).index(known)
        evaluated = [row for row in comparison.rows if row["role"] == "compared" and row["method"] == "voco"]
        for tokens in sorted({n for n, _ in TABLE_8} | {row["n"] for row in evaluated}):
            published = [TABLE_8.get((tokens, pixels)) for pixels in RESOLUTIONS]
            paper = tuple(None if values is None else values[column] for values in published)
            of_n = [row for row in evaluated if row["n"] == tokens]
            if not of_n:
                rows.append(VideoRow(VIDEO_SETS[known], tokens, paper, "", None, "", None))
            for row in of_n:
                key = row["output"], tokens
                verdicts = [figure for figure in judged if (figure.output, figure.n) == key and not figure.problem]
                for verdict in verdicts or (None,):
                    rows.append(VideoRow(VIDEO_SETS[known], tokens, paper, row["label"], verdict, row["metric"], row["score"]))
    return rows
