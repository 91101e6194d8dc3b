"""Ingest on two nodes without a shared directory, over S3: driver, worker, S3 server and node are killed, the bytes stay."""

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

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
CPUS = 3  # of each node
WORKERS = 2
UNITS = 56
SEED = int(os.environ.get("VOCO_KILL_SEED", "0")) or int(time.time())
LAX = {"max_missing_share": 1.0, "max_reject_share": 1.0, "unit_rows": 32}


class World:
    """A cluster, its storage, and the unbroken run that every broken one is held against."""

    def __init__(self, head: Cluster, s3: Server, place: Path) -> None:
        self.head = head
        self.s3 = s3
        self.place = place
        source = s3.served / "source"
        listed, images = good(2080, 1712)
        listed += [row(1, "gone.jpg", "<image>\nHi", "Ho"), 3, row(2, "text.jpg", "<image>\nHi", "Ho")]
        images["text.jpg"] = b"no image"
        write(source, listed, {})
        with zipfile.ZipFile(source / "images.zip", "w") as packed:
            for name, data in images.items():
                packed.writestr(name, data)
        (s3.served / "out").mkdir()
        self.whole = pipelines.run(self._job(str(source), str(place / "whole"), 10**6))
        self.hashes = part_hashes(place / "whole")
        assert len(self.whole.tables["samples"]) == UNITS

    def _job(self, source: str, output: str, in_process_rows: int) -> Job:
        asked = job(source, output, workers=WORKERS, in_process_rows=in_process_rows, **LAX)
        return asked.model_copy(update={"inputs": asked.inputs.model_copy(update={"media": f"{source}/images.zip"})})

    def output(self, name: str) -> Path:
        return self.s3.served / "out" / name

    def send(self, name: str) -> subprocess.Popen[bytes]:
        """The driver of a job on the cluster, a process of this test."""
        file = self.place / f"{name}.yaml"
        file.write_text(yaml.safe_dump(self._job("s3://source", f"s3://out/{name}", 0).model_dump(exclude_none=True)))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_ADDRESS": self.head.gcs, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": self.head.token_path}
        command = [sys.executable, "-m", "pipelines", "run", str(file)]
        with file.with_suffix(".log").open("w") as log:
            return subprocess.Popen(command, cwd=self.place, env=environment, stdout=log, stderr=log)

    def said(self, name: str) -> str:
        return (self.place / f"{name}.log").read_text()

    def waits(self) -> bool:
        """A worker has said that it waits for S3; in its own file, because Ray passes lines on when it comes to it."""
        logs = (self.place / ".demo/ray").glob("session_2*/logs/worker-*.out")
        return any("does not answer, waiting up to 180 s" in log.read_text(errors="replace") for log in logs)

    def done(self, name: str) -> dict[str, list[tuple[int, int]]]:
        """inode and mtime of the record and the part of every unit that is done, by the name of the part."""
        found = {}
        for file in (self.output(name) / "units").glob("*.json"):
            part = self.output(name) / "samples" / f"part-{file.stem}.parquet"
            found[part.stem] = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in (file, part)]
        return found

    def until(self, true: Callable[[], bool], name: str, sent: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 240  # a busy machine starts workers slowly
        while not true():
            assert sent.poll() is None, self.said(name)[-6000:]
            assert time.monotonic() < deadline, self.said(name)[-6000:]
            time.sleep(0.005)

    def ends_like_the_unbroken_run(self, name: str, sent: subprocess.Popen[bytes]) -> None:
        assert sent.wait(240) == 0, self.said(name)[-6000:]
        done = manifest.read_manifest(f"s3://out/{name}")
        assert isinstance(done, Manifest)
        assert part_hashes(self.output(name)) == self.hashes
        assert (done.tables, done.counts, done.statistics) == (self.whole.tables, self.whole.counts, self.whole.statistics)

    def workers(self) -> list[psutil.Process]:
        """Ray's processes of this cluster that are ready to do units."""
        found = [process for process in cluster.members(self.head.mark) if "_UnitCall" in title(process)]
        return [process for process in found if not title(process).endswith("__init__")]

    def second_node(self) -> list[psutil.Process]:
        """Every process of the cluster that is not the head's."""
        head = psutil.Process(self.head.pid)
        heads = {head, *head.children(recursive=True)}
        return [process for process in cluster.members(self.head.mark) if process not in heads]


def killed_in_a_unit(process: psutil.Process) -> bool:
    """SIGKILL to a worker that is doing a unit; False when it is not, just now."""
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
    place = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'platform'}:{ROOT}")
        with two_nodes.started(place, CPUS) as head:
            yield World(head, s3, place)


def test_the_driver_is_killed_while_it_lists_and_between_units(world: World) -> None:
    print(f"VOCO_KILL_SEED={SEED}")
    draw = random.Random(SEED)
    out = world.output("driver")
    sent = world.send("driver")
    world.until((out / "run.json").exists, "driver", sent)
    time.sleep(draw.uniform(0, 0.3))
    sent.kill()
    assert sent.wait(10) == -signal.SIGKILL
    assert not world.done("driver")
    sent = world.send("driver")
    target = draw.randrange(1, UNITS - 20)
    world.until(lambda: len(world.done("driver")) >= target, "driver", sent)
    sent.kill()
    assert sent.wait(10) == -signal.SIGKILL
    before = world.done("driver")
    print(f"killed after {len(before)} units")
    parts = {file.stem for file in (out / "samples").glob("part-*.parquet")}
    assert len(parts - before.keys()) <= WORKERS
    sent = world.send("driver")
    world.ends_like_the_unbroken_run("driver", sent)
    assert f" of {len(world.done('driver'))} units are done already" in world.said("driver")
    assert {part: state for part, state in world.done("driver").items() if part in before} == before


def test_a_worker_process_is_killed_in_a_unit(world: World) -> None:
    sent = world.send("worker")
    world.until(lambda: len(world.done("worker")) >= 3, "worker", sent)
    workers = world.workers()  # looking through all processes takes longer than a unit
    world.until(lambda: any(killed_in_a_unit(process) for process in workers), "worker", sent)
    assert len(world.done("worker")) < UNITS
    world.ends_like_the_unbroken_run("worker", sent)


def test_the_s3_server_stops_and_comes_back(world: World) -> None:
    sent = world.send("server")
    world.until(lambda: len(world.done("server")) >= 5, "server", sent)
    world.s3.stop()
    done = len(world.done("server"))
    world.until(world.waits, "server", sent)
    assert len(world.done("server")) == done < UNITS
    world.s3.start()
    world.ends_like_the_unbroken_run("server", sent)
    assert world.said("server").count("does not answer") <= 2  # Ray tells equal lines of other workers once more, together


def test_a_node_is_killed_while_it_does_a_unit(world: World) -> None:
    """The last test: the cluster is then smaller."""
    sent = world.send("node")
    world.until(lambda: bool(set(world.workers()) & set(world.second_node())), "node", sent)
    node = world.second_node()
    (worker,) = set(world.workers()) & set(node)
    world.until(lambda: killed_in_a_unit(worker), "node", sent)
    for process in node:
        if process.is_running():
            process.kill()
    assert len(world.done("node")) < UNITS
    world.ends_like_the_unbroken_run("node", sent)
    assert not world.second_node()
