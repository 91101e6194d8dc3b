"""Fixtures that several rooms share: one local Ray, one real S3 server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_process

os.environ["WANDB_MODE"] = "disabled"  # tests of W&B turn it on; elsewhere it would only cost time


# files that take long, the longest first
LONGEST = (
    "test_stages.py", "test_flow.py", "test_resume.py", "test_submit.py", "test_step.py", "test_tiles.py", "test_extending.py",
    "test_wandb_tracking.py", "test_wandb_ends.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that neither of two processes is left with a long file at the end."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def ray_local() -> Iterator[str]:
    """Ray in this process, with four logical CPUs even where the machine has fewer, so that actor pools cannot deadlock.

    Yields the cluster's address, for a second driver.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process for each training; nothing takes this node away
    import ray

    from voco.run.ray_init import try_starts

    if not ray.is_initialized():
        options = {"num_cpus": 4, "include_dashboard": False, "log_to_driver": False}
        try_starts("Ray did not start", lambda: ray.init(address="local", **options))
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")  # per module, so that rclone's tree stays small: a put into new folders slows as it grows
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_process.Server]:
    """`rclone serve s3` on loopback, with credentials and AWS_ENDPOINT_URL in the environment."""
    from voco.store.s3 import PatientS3

    server = s3_process.Server(tmp_path_factory.mktemp("s3"), tmp_path_factory.mktemp("rclone") / "log")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        PatientS3.clear_instance_cache()
        yield server
    server.stop()
    PatientS3.clear_instance_cache()


@pytest.fixture(scope="module")
def s3_server(s3: s3_process.Server) -> Path:
    """The folder that the S3 server serves. A folder in it is a bucket: `(s3_server / "bucket").mkdir()`."""
    return s3.served
