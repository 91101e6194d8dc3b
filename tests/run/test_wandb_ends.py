"""How a tracked run ends: exit codes, Ctrl-C, a dead or hanging wandb-core, no server, no tracking."""

from __future__ import annotations

import math
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest
from wandb_world import RUN, SECRETS, attempt, attempts, command, environment, of, raw_job, steps  # tests/wandb_world.py

from voco.job.load import build_job
from voco.run import wandb_tracking


@pytest.mark.parametrize(("raised", "code"), [("KeyboardInterrupt", 130), ("Stopped('x')", 130), ("ValueError", 1)])
def test_the_exit_code_says_how_the_job_ended(tmp_path: Path, raised: str, code: int) -> None:
    raw = raw_job(tmp_path, str(tmp_path / "out"))
    script = f"from voco.errors import Stopped\nwith run:\n    run.log_steps(rows(0, 3))\n    raise {raised}\n"
    exit_code = -signal.SIGINT if raised == "KeyboardInterrupt" else 1
    attempt(raw, script, tmp_path, exit_code=exit_code)
    (records,) = attempts(raw["output"])
    assert [line.exit_code for line in of(records, "exit")] == [code]
    assert len(steps(records)) == 3


def test_ctrl_c_to_the_process_group_ends_it_and_keeps_its_steps(tmp_path: Path) -> None:
    raw = raw_job(tmp_path, str(tmp_path / "out"))
    script = "with run:\n    run.log_steps(rows(0, 3))\n    print('ready', flush=True)\n    time.sleep(100)\n"
    process = subprocess.Popen(
        command(raw, script), env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    process.stdout.close()
    (records,) = attempts(raw["output"])
    assert len(steps(records)) == 3
    assert [line.exit_code for line in of(records, "exit")] == [130]


@pytest.mark.parametrize("stopped", ["SIGKILL", "SIGSTOP"])
def test_a_dead_or_hanging_wandb_core_ends_the_tracking_and_not_the_job(tmp_path: Path, stopped: str) -> None:
    raw = raw_job(tmp_path, str(tmp_path / "out"))
    script = f"""
    import psutil
    run.log_steps(rows(0, 3))
    (core,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    core.send_signal(signal.{stopped})
    wandb_tracking.CALL_S = 2.0
    run.finish(0)
    print("job done")
    """
    done = attempt(raw, script, tmp_path)
    assert "job done" in done.stdout
    assert "W&B is off" in done.stderr


def test_nothing_is_recorded_or_imported_when_it_is_off(tmp_path: Path) -> None:
    script = """
    run.log_steps(rows(0, 3)); run.log_predictions([]); run.log_summary({"a": 1}); run.flush(); run.finish(0)
    assert "wandb" not in sys.modules
    """
    off = raw_job(tmp_path, str(tmp_path / "off"), tracking={"wandb": False})
    attempt(off, script, tmp_path)
    on = raw_job(tmp_path, str(tmp_path / "on"))
    attempt(on, script, tmp_path, WANDB_MODE="disabled")
    assert not (tmp_path / "off").exists()
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize("key", [{}, {"WANDB_API_KEY": SECRETS["WANDB_API_KEY"], "WANDB_BASE_URL": "http://127.0.0.1:9"}])
def test_online_without_a_server_does_not_prompt_and_records_offline(tmp_path: Path, key: dict[str, str]) -> None:
    """Without an API key, and with one whose server does not answer."""
    raw = raw_job(tmp_path, str(tmp_path / "out"))
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        command(raw, "run.log_steps(rows(0, 3)); run.finish(0)"),
        env=environment(tmp_path, WANDB_MODE="online", **key),
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    assert process.wait(150) == 0
    printed = os.read(master, 65536).decode()
    os.close(master)
    assert "recording offline" in printed
    assert ("no API key" in printed) == (not key)
    assert len(printed.splitlines()) == 1, printed
    assert len(steps(attempts(raw["output"])[-1])) == 3


def test_steps_go_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = wandb_tracking.start_tracking(
        wandb_tracking.tracked_job(build_job("job.yaml", raw_job(tmp_path, str(tmp_path / "out"))), RUN)
    )
    run.log_steps([{"step": 4, "loss": math.nan, "grad_norm": None}])
    with pytest.raises(ValueError, match="in order and above 4"):
        run.log_steps([{"step": 3, "loss": 1.0}])
    run.finish(0)
    (line,) = steps(attempts(str(tmp_path / "out"))[0])
    assert line["loss"] == "NaN" or math.isnan(line["loss"])
    assert "grad_norm" not in line
