"""Reads what its trials read; writes runs/<trial>/{train,answers,lower} and trials/, one row of scores a trial and category."""

from __future__ import annotations

import functools
import time

import pyarrow as pa

import pipelines
from voco import manifest, rows, running, storage, sweep, tracking, work
from voco.errors import Stopped
from voco.manifest import Manifest
from voco.spec import Job
from voco.trials import trials as trials_of


def run(job: Job, run_id: str) -> Manifest:
    """Train every trial on Ray Tune, then evaluate each against the bounds that the sweep itself holds."""
    started = time.time()
    trials = trials_of(job)
    print(f"{job.name}: {len(trials)} trials: {', '.join(trial.name for trial in trials)}", flush=True)
    replace = manifest.replacing(storage.resolve(job.output))
    sweep.train_all(job, run_id, trials, functools.partial(train, replace=replace))
    found: list[dict[str, object]] = []
    for trial in sorted(trials, key=lambda trial: not trial.is_bound):  # bounds are what the others are measured by
        trained = manifest.read(storage.resolve(trial.train.output))
        assert trained is not None
        for evaluation in trial.evaluations:
            if running.stopping():
                raise Stopped(f"{job.name}: stopped before {evaluation.name}; sent again, it continues there")
            with tracking.group(run_id):
                pipelines.run(evaluation, replace)
            scores = rows.read_table(work.part(storage.resolve(evaluation.output), "scores", 0)).to_pylist()
            facts = {"trial": trial.name, "output": storage.resolve(evaluation.output)}
            facts |= {"final_loss": trained.statistics["final_loss"], "train_seconds": trained.seconds}
            found += [{**facts, **row} for row in scores]
    table = pa.Table.from_pylist(found, schema=rows.TRIALS)
    entry = rows.write_table(work.part(storage.resolve(job.output), "trials", 0), [table], rows.TRIALS)
    return manifest.finish(job, run_id, started, counts={"trials": len(trials)}, tables={"trials": [entry]})


def train(job: Job, replace: bool) -> float:
    """One trial's training, in a process of Tune; returns the final loss."""
    return float(pipelines.run(job, replace).statistics["final_loss"])
