"""Reads samples/, features/ or frame_cache/ if either is given, and a checkpoint; writes answers/ and scores/."""

from __future__ import annotations

import time

from voco.evaluate import aggregate, answering, official, predictions, preflight, scores
from voco.job.evaluation import Evaluate
from voco.job.spec import Job
from voco.precompute.features import check_decoded
from voco.report.wandb_outputs import record_evaluation as record
from voco.run import manifest, units
from voco.run.logs import get_logger
from voco.run.manifest import Manifest

__all__ = ["record", "run"]

log = get_logger("voco.evaluate")


def run(job: Job, run_id: str) -> Manifest:
    """Answer every question by the cached path, then score it against the bounds when they are given."""
    started = time.time()
    block: Evaluate = job.block
    token_counts, adaptive = preflight.check_evaluation(job), preflight.read_calibration(job)
    output, samples = job.output_uri, job.resolved_inputs.sample_uris
    count = answering.list_evaluation_rows(output, samples, block)
    bounds = preflight.read_bounds(job)
    scores.check_bound_metrics(official.job_metric(job), {"upper": job.inputs.upper, "lower": job.inputs.lower})
    arguments = answering.worker_arguments(job, adaptive)
    records = units.run_units(output, count, answering.AnswerWorker, arguments, job.resources, in_process=False, label=job.name)
    check_decoded(job.name, records)
    rows, fields = aggregate.write_scores(job, records, token_counts, bounds)
    files = predictions.write_predictions(job)
    fields["tables"] |= {predictions.FOLDER: files} if files else {}
    lines = [*aggregate.example_lines(job), *aggregate.score_lines(job, rows, fields["counts"]["images"])]
    lines += official.official_lines(job, fields["statistics"])
    for line in lines + predictions.prediction_lines(job, files):
        log.info("%s", line)
    return manifest.write_manifest(job, run_id, started, **fields)
