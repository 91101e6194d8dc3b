"""Driver side of training: the starting model, and Ray Train's trainer for the job's resources."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from voco.errors import JobFailed, Stopped
from voco.job.config import Training, VideoSft
from voco.job.resources import WorkerRange
from voco.job.spec import Job
from voco.run import claim, manifest, wandb_tracking
from voco.run.logs import get_logger
from voco.run.manifest import Manifest
from voco.run.ray_init import run_in_thread
from voco.run.units import is_one_node
from voco.store import parquet, schemas, storage
from voco.train.checkpoint_files import FOLDER
from voco.train.initial_model import initial_model
from voco.train.preflight import run_preflight

log = get_logger(__name__)

STARTS = 3  # attempts to start the workers, since one may die before training begins
FAILURES = 3  # without a checkpoint between them, after which Ray Train does not start the workers again


class ControllerDied(JobFailed):
    """The process of Ray Train's controller is gone. Ray frees the workers' places when the driver ends, too."""


def run_training(job: Job, run_id: str) -> Manifest:
    """Train the job's model and write its checkpoint directory; every kind of training job.

    Raises Stopped after a clean stop, JobFailed when a worker failed.
    """
    started = time.time()
    output = job.output_uri
    returned = fit(job, run_id, output)
    if isinstance(job.block, VideoSft):  # the compressor of its caches is copied with it
        from voco.model import weights

        weights.copy_compressor(job.resolved_inputs.checkpoint or "", output)
    return finish_training(job, run_id, started, returned)


def fit(job: Job, run_id: str, output: str) -> dict[str, Any]:
    """Train on Ray Train workers and return what rank 0 returned. Continues from the last checkpoint under `output`."""
    block: Training = job.block
    model, layout = initial_model(job, output)
    inputs = job.resolved_inputs
    teacher = run_preflight(job, layout, model)
    config = {
        "name": job.name,
        "kind": job.kind,
        "run_id": run_id,
        "peak_tflops": job.resources.peak_tflops,
        "run": claim.current_run(),
        "tracked": wandb_tracking.tracked_job(job, run_id),
        "seed": job.seed,
        "block": block.model_dump(),
        "samples": [item.model_dump() for item in inputs.samples],
        "val": inputs.val or "",
        "features": inputs.features or "",
        "frame_cache": inputs.frame_cache or "",
        "threads": max(1, int(job.resources.cpus_per_worker) - 1),  # that decode images where no features are given
        "model": model,
        "layout": layout.model_dump(),
        "compression": None if job.compression is None else job.compression.model_dump(),
        "output": output,
        "teacher": None if teacher is None else {"uri": inputs.teacher, "layout": teacher.model_dump()},
    }
    with _ray_train_settings(job.resources.is_elastic):
        returned = _fit(job, run_id, output, config)
    if "failed" in returned:
        raise JobFailed(f"{job.name}: {returned['failed']}")
    if returned["stopped"]:
        raise Stopped(f"{job.name}: stopped at step {returned['steps']}; submitted again, it continues there")
    return returned


@contextmanager
def _ray_train_settings(elastic: bool) -> Iterator[None]:
    """Ray Train's settings for this training, which it reads from the environment, unless they are set there already."""
    settings = {
        # a fixed number of workers may have to wait for nodes that boot; a range takes nodes that are there
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60" if elastic else "900",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line of a worker twice
    }
    if is_one_node() and not elastic:
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process for each training, and the node goes with the driver
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _fit(job: Job, run_id: str, output: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return what rank 0 returned. Ray restarts failed workers, but not a group that fails to start: that is done here."""
    import ray.train
    from ray.train.torch import TorchConfig

    from voco.train.trainer import Trainer
    from voco.train.worker_loop import train

    resources = job.resources
    workers = resources.workers
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    folder = storage.join(output, FOLDER)
    filesystem, path = storage.arrow_filesystem(folder)
    for start in range(STARTS):
        trainer = Trainer(
            train,
            folder=folder,
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(workers.min, workers.max) if isinstance(workers, WorkerRange) else workers,
                elastic_resize_monitor_interval_s=workers.resize_every_s if isinstance(workers, WorkerRange) else 60.0,
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": resources.cpus_per_worker} | gpus,
                accelerator_type=resources.accelerator,
            ),
            run_config=ray.train.RunConfig(
                name=run_id,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=FAILURES),
            ),
        )
        try:
            returned: dict[str, Any] = run_in_thread(trainer.fit).return_value
            return returned
        except ray.exceptions.RayActorError as error:
            reason = f"Ray Train's controller died ({_last_line(error)})"
            raise ControllerDied(f"{job.name}: {reason}; submitted again, it continues") from error
        except ray.train.TrainingFailedError as error:
            if not isinstance(error, ray.train.ControllerError) or start == STARTS - 1:
                raise JobFailed(f"{job.name}: training failed: {_last_line(error)}") from error
            log.warning("%s: the workers did not start (%s); starting them again", job.name, _last_line(error)[:120])
    raise AssertionError("unreachable")


def finish_training(job: Job, run_id: str, started: float, returned: dict[str, Any]) -> Manifest:
    """The manifest of a checkpoint directory whose training ended."""
    output = job.output_uri
    metrics = parquet.read_table(storage.join(output, schemas.METRICS_FILE))
    tables: dict[str, list[dict[str, Any]]] = {}
    for part in ("model", "adapter"):
        for name in storage.list_names(storage.join(output, part)):
            uri = storage.join(output, part, name)
            entry = {"path": f"{part}/{name}", "bytes": storage.file_size(uri), "sha256": storage.file_sha256(uri)}
            tables.setdefault(part, []).append(entry)
    return manifest.write_manifest(
        job,
        run_id,
        started,
        counts={"steps": returned["steps"], "text_tokens_cut": sum(metrics["cut"].to_pylist())},
        tables=tables,
        statistics={
            "final_loss": metrics.filter(pc.greater(metrics["tokens"], 0))["loss"][-1].as_py(),
            "supervised_tokens": sum(metrics["tokens"].to_pylist()),
            "training_seconds": sum(metrics["seconds"].to_pylist()),
            "attention": returned["attention"],
            **(validated(metrics, returned["exported"]) if job.block.validation is not None else {}),
        },
    )


def validated(metrics: pa.Table, exported: int) -> dict[str, Any]:
    """What the manifest says of a training with validations: the step whose weights are the output, and its figures there."""
    (row,) = metrics.filter(pc.equal(metrics["step"], exported - 1)).to_pylist()
    return {"exported_step": exported, "val_loss": row["val_loss"], "val_score": row["val_score"]}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
