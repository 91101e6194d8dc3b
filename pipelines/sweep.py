"""Reads the inputs of its trials; writes runs/<trial>/{train,answers,lower} and trials/, one row per trial and category."""

from __future__ import annotations

import time

import pipelines
from voco.errors import Stopped
from voco.evaluate.aggregate import trial_rows, write_trials
from voco.job.spec import Job
from voco.job.trials import sweep_trials
from voco.report.wandb_outputs import record_sweep as record
from voco.run import claim, manifest, wandb_tracking
from voco.run.logs import get_logger
from voco.run.manifest import Manifest
from voco.train.tune import run_trials

__all__ = ["record", "run"]

log = get_logger("voco.sweep")


def run(job: Job, run_id: str) -> Manifest:
    """Train every trial on Ray Tune, then evaluate each against the bounds among the sweep's own trials."""
    started = time.time()
    trials = sweep_trials(job)
    log.info("%s: %d trials: %s", job.name, len(trials), ", ".join(trial.name for trial in trials))
    replace = manifest.is_replacing(job.output_uri)
    run_trials(job, run_id, trials, replace)
    rows: list[dict[str, object]] = []
    for trial in sorted(trials, key=lambda trial: not trial.is_bound):  # the others are scored against the bounds
        for evaluation in trial.evaluations:
            if claim.is_stopping():
                raise Stopped(f"{job.name}: stopped before {evaluation.name}; submitted again, it continues there")
            with wandb_tracking.wandb_group(run_id):
                pipelines.run(evaluation, replace)
            rows += trial_rows(trial, evaluation)
    entry = write_trials(job, rows)
    return manifest.write_manifest(job, run_id, started, counts={"trials": len(trials)}, tables={"trials": [entry]})
