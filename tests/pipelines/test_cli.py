"""Exit codes, and one line on stderr without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ingest import source

from pipelines import cli
from voco.job.spec import Job

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}


def job_file(folder: Path, job: Job) -> Path:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(exclude_none=True)))
    return file


def test_refused_is_exit_code_two_and_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: x\nkind: ingset\n")
    for command in ("plan", "run", "submit"):
        assert cli.main([command, str(file), *(["--address", "http://127.0.0.1:9"] if command == "submit" else [])]) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"refused: {file}: kind: expected ")
        assert printed.err.endswith("got 'ingset'; did you mean ingest?\n")
        assert printed.err.count("\n") == 1


def test_no_cluster_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["status", "x-12345678"]) == 2
    assert "no cluster: give --address" in capfd.readouterr().err


def test_plan_into_a_closed_pipe_ends_without_a_traceback() -> None:
    command = [sys.executable, "-m", "pipelines", "plan", "jobs/paper/flow.yaml"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_commands_and_options_are_exit_code_two() -> None:
    for arguments in (["fly"], ["plan"], ["plan", "x", "--address", "y"]):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(arguments)
        assert exit_info.value.code == 2


@pytest.mark.ray
def test_run_in_its_own_ray_fails_stops_and_continues(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    listed, images = source.good(400, 400)
    source.write(tmp_path / "source", listed, images)
    slow = job_file(tmp_path, source.job(tmp_path / "source", tmp_path / "out", unit_rows=1))
    command = [sys.executable, "-m", "pipelines", "run", str(slow)]

    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/units/*.json")):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 130, (out, err)
    assert "stopped: ingest-test: stopped after unit" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "manifest.json").exists()

    (tmp_path / "source" / "mix.json").write_text("[]")
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2  # the input changed, so the output belongs to another run
    assert "holds run" in failed.stderr
