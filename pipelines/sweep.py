"""Reads what its trials read; writes runs/<trial>/{train,answers,lower} and trials/, one row of scores a trial and category."""

from __future__ import annotations

import functools
import time

import pyarrow as pa

import pipelines
from voco.errors import Stopped
from voco.job.spec import Job
from voco.job.trials import sweep_trials as trials_of
from voco.run import claim, manifest, units, wandb_tracking
from voco.run.manifest import Manifest
from voco.store import parquet, schemas, storage
from voco.train import tune


def run(job: Job, run_id: str) -> Manifest:
    """Train every trial on Ray Tune, then evaluate each against the bounds that the sweep itself holds."""
    started = time.time()
    trials = trials_of(job)
    print(f"{job.name}: {len(trials)} trials: {', '.join(trial.name for trial in trials)}", flush=True)
    replace = manifest.is_replacing(storage.resolve(job.output))
    tune.run_trials(job, run_id, trials, functools.partial(train, replace=replace))
    found: list[dict[str, object]] = []
    for trial in sorted(trials, key=lambda trial: not trial.is_bound):  # bounds are what the others are measured by
        trained = manifest.read_manifest(storage.resolve(trial.train.output))
        assert trained is not None
        for evaluation in trial.evaluations:
            if claim.is_stopping():
                raise Stopped(f"{job.name}: stopped before {evaluation.name}; sent again, it continues there")
            with wandb_tracking.wandb_group(run_id):
                pipelines.run(evaluation, replace)
            scores = parquet.read_table(units.part_uri(storage.resolve(evaluation.output), "scores", 0)).to_pylist()
            facts = {"trial": trial.name, "output": storage.resolve(evaluation.output)}
            facts |= {"final_loss": trained.statistics["final_loss"], "train_seconds": trained.seconds}
            found += [{**facts, **row} for row in scores]
    table = pa.Table.from_pylist(found, schema=schemas.TRIALS)
    entry = parquet.write_table(units.part_uri(storage.resolve(job.output), "trials", 0), [table], schemas.TRIALS)
    return manifest.write_manifest(job, run_id, started, counts={"trials": len(trials)}, tables={"trials": [entry]})


def train(job: Job, replace: bool) -> float:
    """One trial's training, in a process of Tune; returns the final loss."""
    return float(pipelines.run(job, replace).statistics["final_loss"])
