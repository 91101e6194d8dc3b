"""Driver side of training: the starting model, and Ray Train's trainer for the job's resources."""

from __future__ import annotations

import os
from typing import Any

import pyarrow.compute as pc

from voco.errors import JobFailed, Stopped
from voco.job.config import Training
from voco.job.spec import Job
from voco.run import claim, manifest, ray_init, wandb_tracking
from voco.run.manifest import Manifest
from voco.store import parquet, storage
from voco.train.initial_model import initial_model
from voco.train.preflight import check_teacher, check_training

STARTS = 3  # of the worker group, when a worker dies before training begins


def fit(job: Job, run_id: str, output: str) -> dict[str, Any]:
    """Train on Ray Train workers and return what rank 0 returned. Continues from the last checkpoint under `output`.

    Raises Stopped after a clean stop, JobFailed when a worker failed.
    """
    block: Training = job.block
    model, layout = initial_model(job, output)
    config = {
        "name": job.name,
        "kind": job.kind,
        "run": claim.current_run(),
        "tracked": wandb_tracking.tracked_job(job, run_id),
        "seed": job.seed,
        "block": block.model_dump(),
        "samples": [{"uri": storage.resolve(item.uri), "weight": item.weight} for item in job.inputs.samples],
        "features": storage.resolve(job.inputs.features or ""),
        "frame_cache": storage.resolve(job.inputs.frame_cache or ""),
        "model": model,
        "layout": layout.model_dump(),
        "output": output,
    }
    check_training(job, layout, model)
    teacher = check_teacher(job, layout, model)
    told = None if job.inputs.teacher is None else storage.resolve(job.inputs.teacher)
    config["teacher"] = None if teacher is None else {"uri": told, "layout": teacher.model_dump()}
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")  # nodes may have to boot first
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line of a worker twice
    returned = _run(job, run_id, output, config)
    if "failed" in returned:
        raise JobFailed(f"{job.name}: {returned['failed']}")
    if returned["stopped"]:
        raise Stopped(f"{job.name}: stopped at step {returned['steps']}; sent again, it continues there")
    return returned


def _run(job: Job, run_id: str, output: str, config: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 returned. Ray starts failed workers again, but not when one dies while the group is starting: we do."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from voco.train.worker_loop import train

    resources = job.resources
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    filesystem, path = storage.arrow_filesystem(storage.join(output, "checkpoints"))
    for start in range(STARTS):
        trainer = TorchTrainer(
            train,
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.workers,
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": resources.cpus_per_worker} | gpus,
                accelerator_type=resources.accelerator,
            ),
            run_config=ray.train.RunConfig(
                name=run_id,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=3),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            returned: dict[str, Any] = ray_init.run_in_thread(trainer.fit).return_value
            return returned
        except ray.train.TrainingFailedError as error:
            if not isinstance(error, ray.train.ControllerError) or start == STARTS - 1:
                raise JobFailed(f"{job.name}: training failed: {_last_line(error)}") from error
            print(f"{job.name}: the workers did not start ({_last_line(error)[:120]}); again", flush=True)
    raise AssertionError("unreachable")


def finish_training(job: Job, run_id: str, started: float, returned: dict[str, Any]) -> Manifest:
    """The manifest of a checkpoint directory whose training ended."""
    output = storage.resolve(job.output)
    metrics = parquet.read_table(storage.join(output, "metrics.parquet"))
    files = [storage.join("model", name) for name in storage.list_names(storage.join(output, "model"))]
    entries = [
        {"path": name, "bytes": storage.file_size(place), "sha256": storage.file_sha256(place)}
        for name in files
        for place in [storage.join(output, name)]
    ]
    return manifest.write_manifest(
        job,
        run_id,
        started,
        counts={"steps": returned["steps"], "text_tokens_cut": sum(metrics["cut"].to_pylist())},
        tables={"model": entries},
        statistics={
            "final_loss": metrics.filter(pc.greater(metrics["tokens"], 0))["loss"][-1].as_py(),
            "supervised_tokens": sum(metrics["tokens"].to_pylist()),
            "training_seconds": sum(metrics["seconds"].to_pylist()),
        },
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
