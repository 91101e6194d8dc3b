"""Driver side of training: the starting model, and Ray Train's trainer for the job's resources."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from voco import running, storage
from voco.errors import JobFailed, Refused, Stopped
from voco.spec import Job, Text
from voco.tokens import Layout
from voco.train.data import SampleTables

STARTS = 3  # of the worker group, when a worker dies before training begins
TOKENIZER_ROWS = 200_000  # rows whose text a new tokenizer is trained on, at most


def starting_point(job: Job, output: str) -> tuple[str, Layout]:
    """The directory that holds the model to start from, and the layout that this job trains it under.

    A new model is written to `<output>/initial` once; a function of the job's seed and samples.
    """
    from voco.model import new, weights

    block, compression = job.image_sft, job.compression
    assert block is not None
    assert compression is not None
    if job.inputs.checkpoint is not None:
        config = weights.read_config(job.inputs.checkpoint)
        layout = Layout(**config["layout"])
        text = block.text or Text(template=layout.template, newlines=layout.newlines)  # type: ignore[arg-type]
        changes = {**compression.model_dump(), "template": text.template, "newlines": text.newlines}
        return storage.resolve(job.inputs.checkpoint), layout.model_copy(update=changes)
    assert job.model is not None
    initial = storage.join(output, "initial")
    if not storage.exists(storage.join(initial, "model", "config.json")):
        model = new.create(job.model, compression, block.text or Text(), _texts(job), job.seed)
        with tempfile.TemporaryDirectory() as folder:
            weights.save(model, weights.own_state(model), Path(folder) / "model")
            storage.put_directory(Path(folder) / "model", storage.join(initial, "model"))
    return initial, Layout(**weights.read_config(initial)["layout"])


def _texts(job: Job) -> Iterator[str]:
    for row in itertools.islice(_tables(job).rows(["conversations"]), TOKENIZER_ROWS):
        for conversation in row["conversations"]:
            yield from (turn["text"] for turn in conversation["turns"])


def fit(job: Job, run_id: str, output: str) -> dict[str, Any]:
    """Train on Ray Train workers and return what rank 0 returned. Continues from the last checkpoint under `output`.

    Raises Stopped after a clean stop, JobFailed when a worker failed.
    """
    block = job.image_sft
    assert block is not None
    model, layout = starting_point(job, output)
    config = {
        "name": job.name,
        "run": running.current(),
        "seed": job.seed,
        "block": block.model_dump(),
        "samples": [{"uri": storage.resolve(item.uri), "weight": item.weight} for item in job.inputs.samples],
        "features": storage.resolve(job.inputs.features or ""),
        "model": model,
        "layout": layout.model_dump(),
        "output": output,
    }
    check(job, layout, model)
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
            returned: dict[str, Any] = apart(trainer.fit).return_value
            return returned
        except ray.train.TrainingFailedError as error:
            if not isinstance(error, ray.train.ControllerError) or start == STARTS - 1:
                raise JobFailed(f"{job.name}: training failed: {_last_line(error)}") from error
            print(f"{job.name}: the workers did not start ({_last_line(error)[:120]}); again", flush=True)
    raise AssertionError("unreachable")


def apart(call: Callable[[], Any]) -> Any:
    """Call in a thread of its own. In the main thread Ray Train would take SIGINT for itself and end without a checkpoint."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def check(job: Job, layout: Layout, model: str) -> None:
    """Refuse what would only fail on the workers: features of another tower or not of these samples, sizes that do not fit."""
    from voco.features import FeatureStore, check_tower
    from voco.model import weights

    block, config = job.image_sft, weights.read_config(model)
    assert block is not None
    features = storage.resolve(job.inputs.features or "")
    check_tower(features, config["preprocessing"])
    if layout.method == "avg_pool" and layout.vision_slots % layout.tokens:
        raise Refused(
            f"compression.tokens: expected a divisor of the tower's {layout.vision_slots} positions, got {layout.tokens}"
        )
    prefix = layout.prefix_length + layout.voco_tokens()
    if prefix >= block.max_tokens:
        raise Refused(f"image_sft.max_tokens: expected more than the prefix's {prefix} tokens, got {block.max_tokens}")
    longest = config["language_model"]["max_position_embeddings"]
    if block.max_tokens > longest:
        raise Refused(f"image_sft.max_tokens: expected at most the model's {longest} positions, got {block.max_tokens}")
    held = FeatureStore(features).index
    images = {one["sha256"] for row in _tables(job).rows(["media.list.element.sha256"]) for one in row["media"] or []}
    missing = images - held.keys()
    if missing:
        raise Refused(f"inputs.features: {features} lacks {len(missing)} of {len(images)} images; make it from these samples")


def _tables(job: Job) -> SampleTables:
    return SampleTables([storage.resolve(item.uri) for item in job.inputs.samples], [1.0] * len(job.inputs.samples))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
