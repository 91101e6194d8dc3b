"""What reaches the user: levels to their streams, Ray's noise nowhere, and progress as a bar on a terminal only."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from voco.run import logs

# lines that Ray 2.60 and torch print on a healthy run
NOISE = (
    "\x1b[36m(TrainController pid=7)\x1b[0m Attempting to start training worker group of size 1",
    "\x1b[36m(RayTrainWorker pid=7)\x1b[0m Setting up process group for: env:// [rank=0, world_size=1]",
    "\x1b[36m(RayTrainWorker pid=7)\x1b[0m   return func(*args, **kwargs)",
    "\x1b[33m(raylet)\x1b[0m WARNING: 10 PYTHON worker processes have been started on node: 5605cc717f with address: 127.0.0.1.",
    "[2026-11-29 23:51:00,148 E 1 1] core_worker.cc:2465: Actor with class name: 'MapWorker' has ... max_restarts > 0.",
    "[2026-11-29 23:57:41,115 I 1 1] logging.cc:303: Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3",
)
LOGGING = """
from voco.run import logs
logs.quiet_ray()
log = logs.get_logger("voco.test")
log.info("%d rows", 3)
log.warning("%d lost", 2)
log.debug("never")
print("partial", end="")
print(" line")
with logs.delay_stderr():
    import os
    os.write(2, b"[E 1 1] core_worker.cc:2465: max_restarts > 0\\n[E 1 1] raylet.cc:1: out of disk\\n")
    log.info("in the block")
"""
PROGRESS = """
from voco.run.logs import Progress
progress = Progress("units", 4)
for done in (1, 4):
    progress.update(done, f"unit {done}/4")
progress.close()
"""
STEPS = """
import sys
from voco.run import logs
logs.quiet_ray()
worker = "\\x1b[36m(RayTrainWorker pid=7)\\x1b[0m "
for line in ("sft: the first sample", "sft: step 1/4, loss 6.2, 3 samples/s", "sft: step 3/4, loss 5.1, 3 samples/s",
             "sft: validation at step 3, loss 5.0", "sft: ends at step 3: 2 validations without a better one", "sft: done"):
    print(worker + line)
"""
MESSAGE = """
from voco.run.logs import Progress, get_logger
progress = Progress("units", 4)
get_logger("voco.test").info("a message")
progress.close()
"""


def python(code: str, **streams: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], text=True, check=True, timeout=60, **streams)  # type: ignore[call-overload,no-any-return]


def test_messages_go_to_stdout_and_warnings_to_stderr() -> None:
    done = python(LOGGING, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout == "3 rows\npartial line\nin the block\n"
    assert done.stderr == "warning: 2 lost\n[E 1 1] raylet.cc:1: out of disk\n"


@pytest.mark.parametrize("line", NOISE)
def test_noise_is_dropped(line: str) -> None:
    stream = io.StringIO()
    print(line, file=logs.QuietStream(stream))
    assert stream.getvalue() == ""


def test_the_traceback_of_a_retried_request_is_dropped_and_the_next_error_is_not() -> None:
    stream = io.StringIO()
    controller, other = "\x1b[36m(TrainController pid=7)\x1b[0m", "(PlacementGroupCleaner pid=8)"
    lines = [
        f"{controller} Failed to send resource request for train-1a2b. If this only happens transiently",
        f"{controller} Traceback (most recent call last):",
        f"{other} Failed to clean up placement group: gone",
        f'{controller}   File "worker.py", line 3009, in get',
        f"{controller} ",
        f"{controller} During handling of the above exception, another exception occurred:",
        f"{controller} ray.exceptions.GetTimeoutError: Get timed out: some object(s) not ready.",
        f"{controller} Training failed:",
        f"{controller} Traceback (most recent call last):",
    ]
    print("\n".join(lines), file=logs.QuietStream(stream))
    assert stream.getvalue().splitlines() == [lines[2], *lines[-2:]]


def test_other_lines_of_workers_lose_only_their_prefix() -> None:
    stream = io.StringIO()
    quiet = logs.QuietStream(stream)
    print("\x1b[36m(RayTrainWorker pid=7, ip=10.0.0.2)\x1b[0m sft: step 1/6, loss 6.2", file=quiet)
    print("(raylet) A worker died or was killed while executing a task", file=quiet)
    print("torch.OutOfMemoryError: CUDA out of memory", file=quiet)
    shown = ["sft: step 1/6, loss 6.2", "(raylet) A worker died or was killed while executing a task"]
    assert stream.getvalue().splitlines() == [*shown, "torch.OutOfMemoryError: CUDA out of memory"]


def test_stderr_is_printed_when_the_block_fails(capfd: pytest.CaptureFixture[str]) -> None:
    @logs.delay_stderr()
    def fail() -> None:
        os.write(2, b"a reason\n")
        raise OSError("failed")

    with pytest.raises(OSError, match="failed"):
        fail()
    assert capfd.readouterr().err == "a reason\n"


def test_progress_is_plain_lines_in_a_file() -> None:
    assert python(PROGRESS, stdout=subprocess.PIPE).stdout == "units: unit 1/4\nunits: unit 4/4\n"


@pytest.mark.parametrize("size", [(24, 100), (0, 0)])
def test_progress_is_a_bar_on_a_terminal(size: tuple[int, int]) -> None:
    """Also on one that does not say its size, as `docker run -t` without a window."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    python(PROGRESS, stdout=child)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    os.close(child)
    assert "100%" in shown
    assert "4/4" in shown
    assert "\n" not in shown.split("100%")[0]


def test_steps_of_a_training_are_lines_in_a_file_and_a_bar_on_a_terminal() -> None:
    lines = python(STEPS, stdout=subprocess.PIPE).stdout.splitlines()
    assert lines[1:3] == ["sft: step 1/4, loss 6.2, 3 samples/s", "sft: step 3/4, loss 5.1, 3 samples/s"]
    assert len(lines) == 6
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    python(STEPS, stdout=child)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    os.close(child)
    assert "sft: the first sample\r\n" in shown
    assert re.search(r"\rsft: +25%.*1/4 .*loss 6\.2, 3 samples/s", shown)
    assert re.search(r"\rsft: +75%.*3/4 .*loss 5\.1, 3 samples/s", shown)
    assert "\rsft: validation at step 3, loss 5.0\r\n" in shown, "above the bar"
    assert shown.endswith("sft: done\r\n"), "a training that ends early has no bar any more"
    assert "step 3/4, loss" not in shown


def test_a_message_goes_above_the_bar() -> None:
    parent, child = pty.openpty()
    python(MESSAGE, stdout=child)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    os.close(child)
    assert "\ra message\r\n" in shown


@pytest.mark.parametrize(
    "line",
    [
        "(TrainController pid=7) [FailurePolicy] RAISE",
        "(TrainController pid=7)   Error: training failed due to worker errors:",
        "(TrainController pid=7)     return func(*args, **kwargs)",
        "(TrainController pid=7) Error in control loop iteration: no Checkpoint successfully created",
        "(PlacementGroupCleaner pid=7) Failed to clean up placement group: gone",
    ],
)
def test_errors_of_rays_own_actors_are_printed(line: str) -> None:
    stream = io.StringIO()
    print(line, file=logs.QuietStream(stream))
    assert stream.getvalue() == line + "\n"


def test_errors_of_workers_are_printed() -> None:
    stream = io.StringIO()
    quiet = logs.QuietStream(stream)
    errors = [
        "Traceback (most recent call last):",
        "    return func(*args, **kwargs)",
        "FutureWarning: x",
        "Checkpoint is damaged",
    ]
    for error in errors:
        print(f"\x1b[36m(RayTrainWorker pid=7)\x1b[0m {error}", file=quiet)
    assert stream.getvalue().splitlines() == errors


def test_a_text_without_a_newline_is_printed_when_flushed() -> None:
    stream = io.StringIO()
    print("a prompt: ", end="", flush=True, file=logs.QuietStream(stream))
    assert stream.getvalue() == "a prompt: "


def test_a_closed_pipe_ends_the_log_and_not_the_job() -> None:
    code = "import os, sys\nfrom voco.run import logs\nlogs.quiet_ray()\nlog = logs.get_logger('voco.test')\nos.close(1)\n"
    code += "r, w = os.pipe(); os.close(r); os.dup2(w, 1)\nlog.info('lost')\nlog.info('lost')\n"
    done = python(code + "log.warning('end'); sys.stderr.flush(); os._exit(0)", stderr=subprocess.PIPE)
    assert done.stderr == "warning: end\n"


def test_an_unknown_level_is_refused() -> None:
    code = "from voco.errors import exit_code\nfrom voco.run.logs import get_logger\n"
    command = [sys.executable, "-c", code + "raise SystemExit(exit_code(lambda: get_logger('voco.x') and 0))"]
    done = subprocess.run(command, text=True, timeout=60, capture_output=True, env={**os.environ, logs.LEVEL: "loud"})
    assert (done.returncode, done.stderr) == (2, "refused: VOCO_LOG_LEVEL: expected DEBUG, INFO, WARNING, ERROR, got LOUD\n")
