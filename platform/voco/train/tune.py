"""Trials on Ray Tune. Each is a separate driver, which starts its own Ray Train workers and is retried when it dies."""

from __future__ import annotations

import os
from typing import Any

from voco.errors import JobFailed, Refused, Stopped
from voco.job.spec import Job, Sweep
from voco.job.trials import Trial
from voco.run import claim, wandb_tracking
from voco.run.ray_init import run_in_thread
from voco.run.stages import run_stage
from voco.store import storage
from voco.train.launch import ControllerDied, run_training

FAILURES = 3  # deaths of a trial's process or controller that Tune retries; an error in training is reported at once


def run_trials(job: Job, run_id: str, trials: list[Trial], replace: bool) -> None:
    """Train every trial, `sweep.concurrent` at a time. A finished trial ends at once, so a killed sweep continues.

    Raises Stopped or JobFailed, with the trial's own message, when a trial stopped or failed; the other trials end first.
    """
    import ray.tune

    sweep: Sweep = job.block
    uri = storage.join(job.output_uri, "tune")
    storage.delete(uri)  # Tune's record of an earlier attempt; the trials' outputs are elsewhere
    filesystem, path = storage.arrow_filesystem(uri)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # asked to stop, the trials end with checkpoints
    jobs = {trial.name: trial.train.model_dump(exclude_none=True) for trial in trials}
    constants = {"root": os.getcwd(), "run": claim.current_run(), "sweep": run_id, "jobs": jobs, "replace": replace}
    tuner = ray.tune.Tuner(
        # a trial's process only waits for its workers: it takes no CPU and runs on the head, which is no spot node
        ray.tune.with_resources(ray.tune.with_parameters(_trial, constants=constants), {"node:__internal_head__": 0.001}),
        param_space={"trial": ray.tune.grid_search(list(jobs))},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=sweep.concurrent, reuse_actors=True),
        run_config=ray.tune.RunConfig(
            name=run_id,
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=FAILURES),
        ),
    )
    results = run_in_thread(tuner.fit)
    reports = [result.metrics or {} for result in results]
    failed = [f"{report['name']}: {report['failed']}" for report in reports if report.get("failed")]
    failed += [str(error).strip().splitlines()[-1] for error in results.errors]
    if claim.is_stopping() or any(report.get("stopped") for report in reports):
        raise Stopped(f"{job.name}: stopped; submitted again, its trials continue where they stopped")
    if failed or len(reports) < len(trials):
        raise JobFailed(f"{job.name}: {len(failed)} of {len(trials)} trials failed: {failed[0] if failed else 'not run'}")


def _trial(config: dict[str, Any], constants: dict[str, Any]) -> None:
    """Runs in a process of Tune. Our own errors are results, not crashes: a retry would not help."""
    import ray.tune

    if os.path.isdir(constants["root"]):
        os.chdir(constants["root"])  # local paths in a job are relative to its driver's directory
    claim.adopt_run(constants["run"])
    name = config["trial"]
    if claim.stop_requested(constants["run"]):  # this trial was still waiting
        ray.tune.report({"name": name, "stopped": "not started"})
        return
    try:
        with wandb_tracking.wandb_group(constants["sweep"]):
            done = run_stage(Job.model_validate(constants["jobs"][name]), run_training, replace=constants["replace"])
        ray.tune.report({"name": name, "loss": done.statistics["final_loss"]})
    except ControllerDied:  # Tune starts the trial again, which continues; the cleaner of elastic.py frees the places
        raise
    except (Refused, JobFailed) as error:
        ray.tune.report({"name": name, "failed": str(error)})
    except Stopped as error:
        ray.tune.report({"name": name, "stopped": str(error)})
