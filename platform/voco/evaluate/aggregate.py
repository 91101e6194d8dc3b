"""Aggregates units and trials: records and answers of all units to `scores/`, the scores of a sweep's trials to `trials/`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from voco.evaluate.official import job_metric, official_statistics, question_facts
from voco.evaluate.scores import read_answers, score_rows
from voco.job.evaluation import Evaluate
from voco.job.spec import Job
from voco.job.trials import Trial
from voco.run import manifest, units
from voco.store import parquet, schemas
from voco.store.schemas import ALL

Bounds = tuple[pa.Table | None, pa.Table | None]  # answers of the upper and the lower bound
Record = dict[str, Any]  # of a unit, or a row of scores

EXAMPLES = 3  # answers that an evaluation shows
EXAMPLE_CHARACTERS = 200  # of each text in such a line


def write_scores(job: Job, records: Iterable[Record], counts: list[int], bounds: Bounds) -> tuple[list[Record], dict[str, Any]]:
    """Score the units' answers at each N of `counts` and write `scores/`.

    Returns the rows, and the counts, tables and statistics of the job's manifest.
    """
    block: Evaluate = job.block
    output = job.output_uri
    answers, metric, facts = read_answers(output), job_metric(job), question_facts(job)
    images = sum(record["counts"]["images"] for record in records)
    rows: list[Record] = []
    totals: dict[str, dict[str, float]] = {}
    for n in counts:
        totals[str(n)] = _sum_figures(records, n)
        at_n = answers.filter(pc.equal(answers["n"], n))
        measures = _measures(totals[str(n)], images, at_n.num_rows) | {"mean_tokens": mean_tokens(at_n)}
        rows += score_rows(metric, at_n, *bounds, block.resamples, job.seed, facts, **measures)
    table = pa.Table.from_pylist(rows, schema=schemas.SCORES)
    entry = parquet.write_table(units.part_uri(output, "scores", 0), [table], schemas.SCORES)
    read = sum(record["counts"]["read"] for record in records)
    return rows, {
        "counts": {"read": read, "written": answers.num_rows, "images": images},
        "tables": {"answers": [part for record in records for part in record["tables"]["answers"]], "scores": [entry]},
        "statistics": totals | official_statistics(job, answers, facts),
    }


def example_lines(job: Job) -> list[str]:
    """The first answers, as a reader would want to see them before any score."""
    with parquet.open_parquet(units.part_uri(job.output_uri, "answers", 0)) as file:
        first = next(file.iter_batches(EXAMPLES), None)
    return [example_line(job.name, row) for row in (first.to_pylist() if first is not None else [])]


def example_line(name: str, answer: Record) -> str:
    """One answer in one line: the question, what the model says, and what is right where that is known."""
    prompt, prediction = (" ".join(answer[key].split())[:EXAMPLE_CHARACTERS] for key in ("prompt", "prediction"))
    references = " or ".join(dict.fromkeys(answer["references"]))[:EXAMPLE_CHARACTERS]
    right = f" (right: {references!r})" if answer["references"] else ""
    return f"{name}: {prompt!r} -> {prediction!r}{right}"


def score_lines(job: Job, rows: list[Record], images: int) -> list[str]:
    """A line for each N: its score over all questions that have references."""
    if job.inputs.frame_cache is not None:
        use = f"{images} videos read from their frame caches"
    elif job.block.fastv is not None:
        use = f"{images} images run for each question"
    else:
        use = f"{images} images compressed once each"
    totals = [row for row in rows if row["category"] == ALL]
    names = [f"N={row['n']}: " if len(totals) > 1 else "" for row in totals]
    if job.block.is_adaptive:
        names = [f"{row['mean_tokens'] or 0:.2f} tokens of a view on average: " for row in totals]
    return [
        f"{job.name}: {name}{_score_text(row['score'])} of {row['questions']} questions, {use}"
        for name, row in zip(names, totals, strict=True)
    ]


def _score_text(score: float | None) -> str:
    return "no score" if score is None else f"{score:.1%}"


def trial_rows(trial: Trial, evaluation: Job) -> list[Record]:
    """The scores of one evaluation of a trial, with the trial's name, output, loss and time of training."""
    output, trained = evaluation.output_uri, manifest.read_manifest(trial.train.output_uri)
    assert trained is not None
    training = {"final_loss": trained.statistics["final_loss"], "train_seconds": trained.seconds}
    facts = {"trial": trial.name, "output": output, **training}
    return [{**facts, **row} for row in parquet.read_table(units.part_uri(output, "scores", 0)).to_pylist()]


def write_trials(job: Job, rows: list[Record]) -> dict[str, Any]:
    """Write a sweep's `trials/` and return its manifest entry."""
    table = pa.Table.from_pylist(rows, schema=schemas.TRIALS)
    return parquet.write_table(units.part_uri(job.output_uri, "trials", 0), [table], schemas.TRIALS)


def _sum_figures(records: Iterable[Record], n: int) -> dict[str, float]:
    """What the units measured at one N (`answering.FIGURES`), added up."""
    figures = [record["figures"][str(n)] for record in records]
    return {key: sum(unit[key] for unit in figures) for key in figures[0]}


def mean_tokens(answers: pa.Table) -> float | None:
    """<voco> tokens of a view that a question about views read on average; None for methods without them."""
    read = answers["tokens_read"].drop_null()
    mean: float | None = pc.mean(read.filter(pc.greater(read, 0))).as_py()
    return mean


def _measures(sums: dict[str, float], images: int, questions: int) -> dict[str, Any]:
    """Columns of a row of scores: bytes of an image, operations and seconds of a question."""
    return {
        "cache_bytes": round(sums["cache_bytes"] / max(1, images)),
        "full_cache_bytes": round(sums["full_cache_bytes"] / max(1, images)),
        "prefill_flops": sums["prefill_flops"] / max(1, questions),
        "uncached_flops": sums["uncached_flops"] / max(1, questions),
        "latency_s": sums["answer_seconds"] / max(1, questions),
        "seconds": sums["compress_seconds"] + sums["answer_seconds"],
    }
