"""What an evaluation and a sweep record in W&B beside their outputs: scores, and a few answers with images."""

from __future__ import annotations

import base64
from typing import Any

from voco.job.spec import Job
from voco.report.pictures import picture
from voco.run import units
from voco.run.wandb_tracking import TrackedRun
from voco.store import parquet, samples
from voco.store.schemas import ALL

ANSWERS_RECORDED = 24  # of an evaluation, with their images


def record_evaluation(run: TrackedRun, job: Job) -> None:
    """The scores of a finished evaluation, and ANSWERS_RECORDED of its answers."""
    run.log_predictions(prediction_rows(job))
    scores = parquet.read_table(units.part_uri(job.output_uri, "scores", 0))
    run.log_summary(summary_scores(scores.to_pylist()))


def record_sweep(run: TrackedRun, job: Job) -> None:
    """The scores of every trial, by its name."""
    rows = parquet.read_table(units.part_uri(job.output_uri, "trials", 0)).to_pylist()
    names = dict.fromkeys(row["trial"] for row in rows)
    run.log_summary({name: summary_scores([row for row in rows if row["trial"] == name]) for name in names})


def summary_scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Score, retention, cache size, the published figure where it is another than the score, and the score by category.

    Under `n1`, `n2`, ... when there are several N.

    A trial that is also a bound has two evaluations; only the first, its own, counts.
    """
    counts = list(dict.fromkeys(row["n"] for row in rows if row["method"] == rows[0]["method"]))
    if len(counts) > 1:
        return {f"n{n}": summary_scores([row for row in rows if row["n"] == n]) for n in counts}
    summary: dict[str, Any] = {}
    for row in rows:
        if row["category"] == ALL:
            figures = {key: row[key] for key in ("score", "official", "retention", "cache_bytes") if row[key] is not None}
            if row["official"] == row["score"]:
                figures.pop("official", None)
            summary |= {key: figure for key, figure in figures.items() if key not in summary}
        else:
            summary.setdefault(f"score_{row['category']}", row["score"])
    return summary


def prediction_rows(job: Job) -> list[dict[str, Any]]:
    """`ANSWERS_RECORDED` answers, evenly spaced in the table's first part, with the image or frames of their questions."""
    answers = parquet.read_table(units.part_uri(job.output_uri, "answers", 0)).to_pylist()
    chosen = answers[:: max(1, len(answers) // ANSWERS_RECORDED)][:ANSWERS_RECORDED]
    media = sample_pictures(job, {row["sample_id"] for row in chosen})
    keys = ("references", "prediction", "correct", "category")
    return [
        {"image": media.get(row["sample_id"]), "question": row["prompt"], **{key: row[key] for key in keys}} for row in chosen
    ]


def sample_pictures(job: Job, sample_ids: set[str]) -> dict[str, bytes]:
    """An encoded picture of the first medium by sample id; samples without a picture are left out."""
    parts = samples.part_uris(job.resolved_inputs.sample_uris)
    rows = samples.read_ids(parts, sample_ids, ["sample_id", "modality", "media"])
    pictures = {row["sample_id"]: picture(row).uri for row in rows}
    return {sample_id: base64.b64decode(uri.split(",", 1)[1]) for sample_id, uri in pictures.items() if uri}
