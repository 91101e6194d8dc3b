"""Trials on Ray Tune. Each is a driver of its own: it starts its own Ray Train workers and is retried when it dies."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from voco.errors import JobFailed, Refused, Stopped
from voco.job.spec import Job
from voco.job.trials import Trial
from voco.run import claim, ray_init, wandb_tracking
from voco.store import storage

FAILURES = 3  # deaths of one trial's process that Tune makes good; what training itself refuses is told at once


def run_trials(job: Job, run_id: str, trials: list[Trial], train: Callable[[Job], float]) -> None:
    """Call `train` with each trial's training job, `sweep.concurrent` at a time; it returns the final loss.

    A trial that is finished already ends at once, so a killed sweep that is sent again goes on where it was.
    Raises Stopped or JobFailed, with the trial's own line, when one did not end well; the others end first.
    """
    import ray.tune

    assert job.sweep is not None
    place = storage.join(storage.resolve(job.output), "tune")
    storage.delete(place)  # Tune's own record of an earlier attempt; what counts lies in the trials' outputs
    filesystem, path = storage.arrow_filesystem(place)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # asked to stop, the trials end with checkpoints
    by_name = {trial.name: trial.train.model_dump(exclude_none=True) for trial in trials}
    constants = {"root": os.getcwd(), "run": claim.current_run(), "sweep": run_id, "jobs": by_name, "train": train}
    tuner = ray.tune.Tuner(
        # a trial's process only waits for its workers, so it takes no CPU, and sits on the head, which no spot market ends
        ray.tune.with_resources(ray.tune.with_parameters(_trial, constants=constants), {"node:__internal_head__": 0.001}),
        param_space={"trial": ray.tune.grid_search(list(by_name))},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=job.sweep.concurrent, reuse_actors=False),
        run_config=ray.tune.RunConfig(
            name=run_id,
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=FAILURES),
        ),
    )
    results = ray_init.run_in_thread(tuner.fit)
    told = [result.metrics or {} for result in results]
    died = [str(error).strip().splitlines()[-1] for error in results.errors]
    stopped = [metrics["stopped"] for metrics in told if metrics.get("stopped")]
    failed = [f"{metrics['name']}: {metrics['failed']}" for metrics in told if metrics.get("failed")] + died
    if stopped or claim.is_stopping():
        raise Stopped(f"{job.name}: stopped; sent again, its trials continue where they are")
    if failed or len(told) < len(trials):
        raise JobFailed(f"{job.name}: {len(failed)} of {len(trials)} trials failed: {failed[0] if failed else 'not run'}")


def _trial(config: dict[str, Any], constants: dict[str, Any]) -> None:
    """Runs in a process of Tune. Our own errors are results, not crashes: trying again would not mend them."""
    import ray.tune

    if os.path.isdir(constants["root"]):
        os.chdir(constants["root"])  # local paths in a job are relative to where its driver runs
    claim.adopt_run(constants["run"])
    name = config["trial"]
    if claim.stop_requested(constants["run"]):  # a trial that waited for its turn
        ray.tune.report({"name": name, "stopped": "not begun"})
        return
    try:
        with wandb_tracking.wandb_group(constants["sweep"]):
            loss = constants["train"](Job.model_validate(constants["jobs"][name]))
        ray.tune.report({"name": name, "loss": loss})
    except (Refused, JobFailed) as error:
        ray.tune.report({"name": name, "failed": str(error)})
    except Stopped as error:
        ray.tune.report({"name": name, "stopped": str(error)})
