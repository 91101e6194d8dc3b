"""The real Jobs API on a cluster with a token, which the test starts and stops: one run however often it is submitted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from ingest import source

from voco.commands import submit
from voco.demo import cluster
from voco.errors import Refused
from voco.job.load import load_job

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with sources, job files and a running cluster in its `.demo/`."""
    root = tmp_path_factory.mktemp("jobs")
    source.write(root / "source", *source.good(3000, 3000))
    line = [stage_of("one", 100), stage_of("two", 200)]
    write_job(root / "line.yaml", {"name": "line", "kind": "flow", "output": "out/line", "flow": {"stages": line}})
    write_job(root / "slow.yaml", {**stage_of("slow", 1), "output": "out/slow"})
    cluster.start(root / ".demo", cpus=3)
    yield root
    cluster.stop(root / ".demo")


def stage_of(name: str, unit_rows: int) -> dict[str, object]:
    inputs = {"annotations": "source/mix.json", "media": "source/images"}  # relative to the working directory
    return {
        "name": name,
        "kind": "ingest",
        "inputs": inputs,
        "ingest": {"format": "llava_json", "dataset": "mix", "unit_rows": unit_rows, "in_process_rows": 10_000},
    }


def write_job(file: Path, job: dict[str, object]) -> None:
    file.write_text(yaml.safe_dump(job))


def clean_environment(**variables: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | variables


def voco(root: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.Popen(
        command, cwd=root, env=clean_environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def test_two_submissions_at_once_are_one_run_and_a_third_reports_it_done(root: Path) -> None:
    both = [finish(process) for process in [voco(root, "submit", "line.yaml"), voco(root, "submit", "line.yaml")]]
    for code, out, err in both:
        assert code == 0, (out, err)
        assert "[2/2] two: ingest" in out, both
    assert sum("; following it" in out for _, out, _ in both) == 1
    client = submit.connect(target(root))
    assert len(client.list_jobs()) == 1
    started = time.monotonic()
    code, out, _ = finish(voco(root, "submit", "line.yaml"))
    assert code == 0
    assert out.startswith("line: done already (line-")
    assert time.monotonic() - started < 30
    assert len(client.list_jobs()) == 1
    # The other half of the race: the submission id is already in use.
    info = client.list_jobs()[0]
    with pytest.raises(RuntimeError, match="already exists"):
        client.submit_job(entrypoint="true", submission_id=info.submission_id)


def test_the_printed_command_does_the_same_by_hand(root: Path) -> None:
    running = voco(root, "submit", "slow.yaml")
    line = ""
    assert running.stdout is not None
    while "ray job submit" not in line.replace("/ray ", "ray "):
        line = running.stdout.readline()
        assert line, running.communicate()
    assert (root / ".demo" / "token").read_text() not in line
    wait_for(lambda: any((root / "out" / "slow").glob("units/*.json")))
    # By hand while it runs: the driver fails, because the output is claimed.
    by_hand = subprocess.run(["bash", "-c", line], cwd="/", env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert by_hand.returncode == 1
    assert "is running already, as job slow-" in by_hand.stdout + by_hand.stderr

    code, out, err = finish(voco(root, "stop", "slow.yaml"))
    assert code == 0, (out, err)
    assert "STOPPED" in out
    code, out, _ = finish(running)
    assert code == 130
    assert "stopped after unit" in out
    assert "Traceback" not in out

    # By hand after that: it continues, and `voco stop` finds it by the job file although Ray named the job differently.
    hand = subprocess.Popen(["bash", "-c", line], cwd="/", env=clean_environment(), stdout=subprocess.PIPE, text=True)
    progress = ""
    assert hand.stdout is not None
    while "units are done already" not in progress:
        progress = hand.stdout.readline()
        assert progress, "the job ended without continuing"
    assert finish(voco(root, "stop", "slow.yaml"))[0] == 0
    hand.communicate(timeout=30)
    code, out, _ = finish(voco(root, "status", "slow.yaml"))
    assert code == 0
    assert out.startswith("raysubmit_")
    assert ": STOPPED, " in out


def test_a_wrong_token_and_an_unknown_run_are_refused(root: Path) -> None:
    (root / "wrong").write_text("0" * 64)
    code, _, err = finish(voco(root, "status", "slow.yaml", RAY_AUTH_TOKEN_PATH="wrong"))
    assert code == 2
    assert "does not accept the token of wrong" in err
    assert err.count("\n") == 1
    code, _, err = finish(voco(root, "logs", "nobody-12345678"))
    assert code == 2
    assert "knows no job of nobody-12345678" in err


def test_a_job_whose_gpus_the_cluster_does_not_have_is_refused_by_plan_and_by_its_driver(root: Path) -> None:
    """With a proxy in the environment that reaches nothing: no request to this machine may go through it."""
    two = {**stage_of("two", 100), "resources": {"gpus_per_worker": 1}}
    two["ingest"] = {**dict(two["ingest"]), "in_process_rows": 0}  # type: ignore[call-overload]
    write_job(
        root / "gpu.yaml", {"name": "gpu", "kind": "flow", "output": "out/gpu", "flow": {"stages": [stage_of("one", 100), two]}}
    )
    refusal = (
        "refused: gpu.yaml: resources: two needs a worker with 1 CPU, 1 GPU; the cluster has 1 node with 0 GPU, at most 3 CPU"
    )
    running = cluster.read_cluster(root / ".demo")
    assert running is not None
    proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    known = {"RAY_ADDRESS": running.dashboard, "RAY_AUTH_TOKEN_PATH": running.token_path}
    code, out, err = finish(voco(root, "plan", "gpu.yaml", **proxies, **known))
    assert (code, err.startswith(refusal), err.count("\n")) == (2, True, 1), err
    assert "[2/2] two: ingest" in out
    code, out, err = finish(voco(root, "plan", "line.yaml", **proxies, **known))
    assert code == 0
    assert f"cluster {running.dashboard}: 1 node with 0 GPU, at most 3 CPU on a node" in out
    code, out, _ = finish(voco(root, "plan", "gpu.yaml", RAY_ADDRESS=running.gcs))  # the port of Ray, not of its dashboard
    assert code == 0
    assert "its dashboard does not answer, so its nodes are not checked" in out
    code, out, err = finish(voco(root, "submit", "gpu.yaml", **proxies))
    assert code == 2
    assert refusal in out
    assert not (root / "out" / "gpu").exists()


def test_a_folder_above_the_limit_of_an_upload_is_refused_before_it_is_sent(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = submit.ClusterTarget(target(root).address, target(root).token_path, ())  # as if it ran elsewhere
    write_job(tmp_path / "job.yaml", {**stage_of("far", 1), "inputs": {"annotations": "s3://b/a.json"}, "output": "s3://b/far"})
    monkeypatch.chdir(tmp_path)
    client, job = submit.connect(remote), load_job("job.yaml")
    assert submit.package_job("job.yaml", job, client, remote, False)[1]["working_dir"] == "."
    with (tmp_path / "weights.pt").open("wb") as file:
        file.truncate(101 << 20)
    with pytest.raises(Refused, match=r"would be uploaded with the job, .* the largest: weights.pt 101 MiB, job.yaml"):
        submit.package_job("job.yaml", job, client, remote, False)
    with pytest.raises(RuntimeError, match="status code 413"):  # what the dashboard says
        client.submit_job(entrypoint="true", runtime_env={"working_dir": "."})


def test_start_reuses_a_cluster_and_stop_leaves_no_process(root: Path) -> None:
    folder = root / ".demo"
    running = cluster.read_cluster(folder)
    assert running is not None
    assert cluster.start(folder) == running
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    before = cluster.members(running.mark)
    assert len(before) > 5
    assert cluster.stop(folder) >= len(before)
    assert not [process for process in before if psutil.pid_exists(process.pid) and process.is_running()]
    assert cluster.read_cluster(folder) is None
    assert cluster.stop(folder) == 0


def target(root: Path) -> submit.ClusterTarget:
    running = cluster.read_cluster(root / ".demo")
    assert running is not None
    return submit.ClusterTarget(running.dashboard, running.token_path, (running.temp_dir,))


def wait_for(condition: object, seconds: float = 200) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
