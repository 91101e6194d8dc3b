"""The official figures of an evaluated set, as its authors aggregate them: POPE's mean F1, MME's sums, MMBench's CircularEval."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from voco.errors import Refused
from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, figure_text, get_metric, official_figures
from voco.job.benchmarks import default_metric
from voco.job.spec import Job
from voco.store.samples import MEDIA_PATH, SampleTables

CHOICES = "conversations.list.element.choices"  # column path
SHOWN = 8  # figures of a log line

# By sample id: the path of its first medium, and the choices of each of its conversations
QuestionFacts = dict[str, tuple[str | None, list[list[str]]]]


def job_metric(job: Job) -> Metric:
    """The metric that marks an evaluation's answers: the job's, else the benchmark's."""
    return get_metric(job.block.metric or default_metric(job.block.benchmark))


def official_statistics(job: Job, answers: pa.Table, facts: QuestionFacts) -> dict[str, Any]:
    """`{"official": {metric, headline, figures: {N: {name: figure}}}}` of answers at one or more N; `facts` of `question_facts`.

    Empty when the set's figure is the mean mark. With `error`, and no figures, when the answers are not the complete set, for
    example half of a pair of MME.
    """
    metric = job_metric(job)
    if metric.aggregate is None:
        return {}
    official: dict[str, Any] = {"metric": metric.name, "headline": metric.headline, "figures": {}}
    for n in sorted(pc.unique(answers["n"]).to_pylist()):
        try:
            official["figures"][str(n)] = _figures(metric, answers.filter(pc.equal(answers["n"], n)), facts)
        except Refused as error:
            return {"official": official | {"figures": {}, "error": str(error)}}
    return {"official": official} if any(official["figures"].values()) else {}


def _figures(metric: Metric, answers: pa.Table, facts: QuestionFacts) -> Figures:
    """The figures at one N."""
    return official_figures(metric, marked_answers(answers, facts))


def marked_answers(answers: pa.Table, facts: QuestionFacts) -> list[MarkedAnswer]:
    """Rows of schemas.ANSWERS as a metric's `aggregate` takes them, in the order of the table."""
    columns = ["sample_id", "conversation_index", "source_id", "category", "prediction", "references", "correct"]
    marked: list[MarkedAnswer] = []
    for row in answers.select(columns).to_pylist():
        image, choices = facts[row["sample_id"]]
        marked.append(
            {
                "prediction": row["prediction"], "references": row["references"], "mark": row["correct"], "image": image,
                "category": row["category"], "choices": choices[row["conversation_index"]], "question_id": row["source_id"],
            }
        )  # fmt: skip
    return marked


def question_facts(job: Job) -> QuestionFacts:
    """What `aggregate` reads of the evaluation's samples; empty where the metric has none."""
    if job_metric(job).aggregate is None:
        return {}
    rows = SampleTables(job.resolved_inputs.sample_uris).rows(["sample_id", MEDIA_PATH, CHOICES])
    return {
        row["sample_id"]: (
            row["media"][0]["path"] if row["media"] else None,
            [conversation["choices"] or [] for conversation in row["conversations"]],
        )
        for row in rows
    }


def official_lines(job: Job, statistics: dict[str, Any]) -> list[str]:
    """A line for each N: the set's figures without those of its categories, the published one first."""
    official = statistics.get("official")
    if official is None:
        return []
    metric = get_metric(official["metric"])
    if "error" in official:
        return [f"{job.name}: no official figures: {official['error']}"]
    name = {n: f"N={n}: " if len(official["figures"]) > 1 else "" for n in official["figures"]}
    note = f" ({metric.note})" if metric.note else ""
    return [f"{job.name}: {name[n]}{_text(metric, figures)}{note}" for n, figures in official["figures"].items()]


def _text(metric: Metric, figures: Figures) -> str:
    names = sorted((name for name in figures if "/" not in name), key=lambda name: name != metric.headline)
    return f"official {metric.name}: " + ", ".join(f"{name} {figure_text(figures[name])}" for name in names[:SHOWN])
