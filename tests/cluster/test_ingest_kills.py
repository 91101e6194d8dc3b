"""Ingest on two nodes without a shared directory, over S3: driver, worker, S3 server or node is killed, the output is equal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import two_nodes
import yaml
from ingest.source import good, job, part_hashes, row, write
from s3_process import Server

import pipelines
from voco.demo import cluster
from voco.demo.cluster import Cluster
from voco.job.spec import Job
from voco.run import manifest
from voco.run.manifest import Manifest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
CPUS = 3  # of each node
WORKERS = 2
UNITS = 56
SEED = int(os.environ.get("VOCO_KILL_SEED", "0")) or int(time.time())
LAX = {"max_missing_share": 1.0, "max_reject_share": 1.0, "unit_rows": 32}


class World:
    """A cluster, its storage, and an uninterrupted run whose output every interrupted one must equal."""

    def __init__(self, head: Cluster, s3: Server, directory: Path) -> None:
        self.head = head
        self.s3 = s3
        self.directory = directory
        source = s3.served / "source"
        rows, images = good(2080, 1712)
        rows += [row(1, "gone.jpg", "<image>\nHi", "Ho"), 3, row(2, "text.jpg", "<image>\nHi", "Ho")]
        images["text.jpg"] = b"no image"
        write(source, rows, {})
        with zipfile.ZipFile(source / "images.zip", "w") as archive:
            for name, data in images.items():
                archive.writestr(name, data)
        (s3.served / "out").mkdir()
        self.expected = pipelines.run(self._job(str(source), str(directory / "expected"), 10**6))
        self.hashes = part_hashes(directory / "expected")
        assert len(self.expected.tables["samples"]) == UNITS

    def _job(self, source: str, output: str, in_process_rows: int) -> Job:
        ingest = job(source, output, workers=WORKERS, in_process_rows=in_process_rows, **LAX)
        return ingest.model_copy(update={"inputs": ingest.inputs.model_copy(update={"media": f"{source}/images.zip"})})

    def output(self, name: str) -> Path:
        return self.s3.served / "out" / name

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a job's driver, a child process of this test, on the cluster."""
        file = self.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(self._job("s3://source", f"s3://out/{name}", 0).model_dump(exclude_none=True)))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_ADDRESS": self.head.gcs, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": self.head.token_path}
        command = [sys.executable, "-m", "pipelines", "run", str(file)]
        with file.with_suffix(".log").open("w") as log:
            return subprocess.Popen(command, cwd=self.directory, env=environment, stdout=log, stderr=log)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def is_waiting(self) -> bool:
        """True when a worker has logged that it waits for S3. Read from its files, because Ray forwards lines late."""
        logs = (self.directory / ".demo/ray").glob("session_2*/logs/worker-*.[eo]*")
        return any("does not answer, waiting up to 180 s" in log.read_text(errors="replace") for log in logs)

    def finished(self, name: str) -> dict[str, list[tuple[int, int]]]:
        """inode and mtime of the record and the part of every finished unit, by the part's name."""
        units = {}
        for file in (self.output(name) / "units").glob("*.json"):
            part = self.output(name) / "samples" / f"part-{file.stem}.parquet"
            units[part.stem] = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in (file, part)]
        return units

    def wait_until(self, condition: Callable[[], bool], name: str, driver: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 240  # a busy machine starts workers slowly
        while not condition():
            assert driver.poll() is None, self.log(name)[-6000:]
            assert time.monotonic() < deadline, self.log(name)[-6000:]
            time.sleep(0.005)

    def ends_as_expected(self, name: str, driver: subprocess.Popen[bytes]) -> None:
        assert driver.wait(240) == 0, self.log(name)[-6000:]
        result = manifest.read_manifest(f"s3://out/{name}")
        assert isinstance(result, Manifest)
        assert part_hashes(self.output(name)) == self.hashes
        expected = self.expected
        assert (result.tables, result.counts, result.statistics) == (expected.tables, expected.counts, expected.statistics)

    def workers(self) -> list[psutil.Process]:
        """Ray's processes of this cluster that are ready to do units."""
        calls = [process for process in cluster.members(self.head.mark) if "_UnitCall" in title(process)]
        return [process for process in calls if not title(process).endswith("__init__")]

    def second_node(self) -> list[psutil.Process]:
        """Every process of the cluster that is not the head's."""
        head = psutil.Process(self.head.pid)
        heads = {head, *head.children(recursive=True)}
        return [process for process in cluster.members(self.head.mark) if process not in heads]


def killed_in_a_unit(process: psutil.Process) -> bool:
    """SIGKILL a worker if it is doing a unit; False if it is not."""
    process.suspend()
    if title(process).endswith(".submit"):
        process.kill()
        return True
    process.resume()
    return False


def title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def world(s3: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'platform'}:{ROOT}")
        with two_nodes.two_node_cluster(directory, CPUS) as head:
            yield World(head, s3, directory)


def test_the_driver_is_killed_while_it_lists_and_between_units(world: World) -> None:
    print(f"VOCO_KILL_SEED={SEED}")
    draw = random.Random(SEED)
    out = world.output("driver")
    driver = world.start("driver")
    world.wait_until((out / "run.json").exists, "driver", driver)
    time.sleep(draw.uniform(0, 0.3))
    driver.kill()
    assert driver.wait(10) == -signal.SIGKILL
    assert not world.finished("driver")
    driver = world.start("driver")
    target = draw.randrange(1, UNITS - 20)
    world.wait_until(lambda: len(world.finished("driver")) >= target, "driver", driver)
    driver.kill()
    assert driver.wait(10) == -signal.SIGKILL
    before_kill = world.finished("driver")
    print(f"killed after {len(before_kill)} units")
    parts = {file.stem for file in (out / "samples").glob("part-*.parquet")}
    assert len(parts - before_kill.keys()) <= WORKERS
    driver = world.start("driver")
    world.ends_as_expected("driver", driver)
    assert f" of {len(world.finished('driver'))} units are done already" in world.log("driver")
    assert {part: state for part, state in world.finished("driver").items() if part in before_kill} == before_kill


def test_a_worker_process_is_killed_in_a_unit(world: World) -> None:
    driver = world.start("worker")
    world.wait_until(lambda: len(world.finished("worker")) >= 3, "worker", driver)
    workers = world.workers()  # once, because a search of all processes takes longer than a unit
    world.wait_until(lambda: any(killed_in_a_unit(process) for process in workers), "worker", driver)
    assert len(world.finished("worker")) < UNITS
    world.ends_as_expected("worker", driver)


def test_the_s3_server_stops_and_comes_back(world: World) -> None:
    driver = world.start("server")
    world.wait_until(lambda: len(world.finished("server")) >= 5, "server", driver)
    world.s3.stop()
    before_restart = len(world.finished("server"))
    world.wait_until(world.is_waiting, "server", driver)
    assert len(world.finished("server")) == before_restart < UNITS
    world.s3.start()
    world.ends_as_expected("server", driver)
    assert world.log("server").count("does not answer") <= 2  # Ray reports equal lines of other workers once more, together


def test_a_node_is_killed_while_it_does_a_unit(world: World) -> None:
    """Must be the last test, because it leaves a smaller cluster."""
    driver = world.start("node")
    world.wait_until(lambda: bool(set(world.workers()) & set(world.second_node())), "node", driver)
    node = world.second_node()
    (worker,) = set(world.workers()) & set(node)
    world.wait_until(lambda: killed_in_a_unit(worker), "node", driver)
    for process in node:
        if process.is_running():
            process.kill()
    assert len(world.finished("node")) < UNITS
    world.ends_as_expected("node", driver)
    assert not world.second_node()
