"""What a finished job leaves in W&B: its output as an artifact; of an evaluation also its scores and some answers with images."""

from __future__ import annotations

import base64
from typing import Any

from voco.evaluate.scores import ALL
from voco.job.spec import Job
from voco.job.trials import sweep_trials
from voco.report.pictures import picture
from voco.run import manifest, units
from voco.run.manifest import Manifest
from voco.run.wandb_tracking import TrackedRun
from voco.store import parquet, storage

PREDICTIONS = 24  # answers with their images, of one evaluation


def record_output(run: TrackedRun, job: Job, done: Manifest) -> None:
    """Hand a finished job to its W&B run. A flow's run also names the outputs of its stages, a sweep's those of its trials."""
    inner = job.flow.stages if job.flow is not None else []
    if job.sweep is not None:
        inner = [one for trial in sweep_trials(job) for one in (trial.train, *trial.evaluations)]
    for stage in inner:
        output = storage.resolve(stage.output)
        finished = manifest.read_manifest(output)
        if finished is not None:
            run.log_output(finished, output)
    output = storage.resolve(job.output)
    if job.kind == "evaluate":
        run.log_predictions(prediction_rows(job))
        run.log_summary(summary_scores(parquet.read_table(units.part_uri(output, "scores", 0)).to_pylist()))
    if job.kind == "sweep":
        table = parquet.read_table(units.part_uri(output, "trials", 0)).to_pylist()
        names = dict.fromkeys(row["trial"] for row in table)
        run.log_summary({name: summary_scores([row for row in table if row["trial"] == name]) for name in names})
    run.log_output(done, output)


def summary_scores(table: list[dict[str, Any]]) -> dict[str, Any]:
    """Score and retention by category; of a trial's two readings the first, its own. Several N are told apart: `n1`, `n2`."""
    counts = list(dict.fromkeys(row["n"] for row in table if row["method"] == table[0]["method"]))
    if len(counts) > 1:
        return {f"n{n}": summary_scores([row for row in table if row["n"] == n]) for n in counts}
    found: dict[str, Any] = {}
    for row in table:
        if row["category"] == ALL:
            found |= {key: row[key] for key in ("score", "retention", "cache_bytes") if row[key] is not None and key not in found}
        else:
            found.setdefault(f"score_{row['category']}", row["score"])
    return found


def prediction_rows(job: Job) -> list[dict[str, Any]]:
    """`PREDICTIONS` answers, evenly from the table's first part, with the image or frames that they are about."""
    answers = parquet.read_table(units.part_uri(storage.resolve(job.output), "answers", 0)).to_pylist()
    chosen = answers[:: max(1, len(answers) // PREDICTIONS)][:PREDICTIONS]
    media = sample_pictures(job, {row["sample_id"] for row in chosen})
    keys = ("references", "prediction", "correct", "category")
    return [
        {"image": media.get(row["sample_id"]), "question": row["prompt"], **{key: row[key] for key in keys}} for row in chosen
    ]


def sample_pictures(job: Job, wanted: set[str]) -> dict[str, bytes]:
    """Sample id to an encoded picture of its first medium, for the samples that have one."""
    found: dict[str, bytes] = {}
    for item in job.inputs.samples:
        folder = storage.join(storage.resolve(item.uri), "samples")
        for name in storage.list_names(folder):
            with parquet.open_parquet(storage.join(folder, name)) as file:
                for group in range(file.num_row_groups):
                    ids = set(file.read_row_group(group, columns=["sample_id"])["sample_id"].to_pylist())
                    if not ids & (wanted - found.keys()):
                        continue
                    for row in file.read_row_group(group, columns=["sample_id", "modality", "media"]).to_pylist():
                        shown = picture(row) if row["sample_id"] in wanted else None
                        if shown is not None and shown.uri:
                            found[row["sample_id"]] = base64.b64decode(shown.uri.split(",", 1)[1])
            if wanted <= found.keys():
                return found
    return found
