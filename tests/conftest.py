"""What tests of several subjects share: one local Ray, one real S3 server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["WANDB_MODE"] = "disabled"  # what tests W&B turns it on; elsewhere it would only cost time


@pytest.fixture(scope="session")
def ray_local() -> Iterator[str]:
    """Ray in this process, with four logical CPUs: more than this machine may have, so that actor pools cannot deadlock.

    Yields the cluster's address, for a second driver.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")  # not the session: hardly any directory cache, or a put into new folders takes ever longer
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`rclone serve s3` on loopback, with credentials and AWS_ENDPOINT_URL in the environment. Yields the served folder.

    A folder in it is a bucket: `(s3_server / "bucket").mkdir()`.
    """
    import s3fs

    served = tmp_path_factory.mktemp("s3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rclone = Path(sys.executable).parent / "rclone"
    log = (tmp_path_factory.mktemp("rclone") / "log").open("w")
    command = [str(rclone), "serve", "s3", str(served), "--addr", f"127.0.0.1:{port}", "--auth-key", "key,secret"]
    server = subprocess.Popen([*command, "--dir-cache-time", "5ms"], stdout=log, stderr=log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        _wait_for(port, server)
        yield served
    server.terminate()
    server.wait(10)
    s3fs.S3FileSystem.clear_instance_cache()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert server.poll() is None, "rclone ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("rclone does not answer")
