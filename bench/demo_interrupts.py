"""Interrupts `make demo` at random moments, in every way a user can, and checks that nothing is left running and it continues.

    python bench/demo_interrupts.py [--points 10] [--longest 240] [--seed 0]

Run it in a clone whose `.demo` may be deleted. Each line: after how many seconds, how, the last line of the demo's log, and how
long the last process took to end. Then the demo runs to its end.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

LOG = Path(".bench/demo_interrupts.log")
WAYS = ("Ctrl-C", "SIGKILL", "make demo-stop")
PATIENCE_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--longest", type=float, default=240.0, help="seconds before an interruption, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    shutil.rmtree(".demo", ignore_errors=True)
    for point in range(options.points):
        how, seconds = WAYS[point % len(WAYS)], draw.uniform(0.5, options.longest)
        demo = start()
        time.sleep(seconds)
        if demo.poll() is not None:
            print(f"{point + 1}: the demo ended with {demo.returncode} before {seconds:.0f} s")
            return demo.returncode
        interrupt(demo, how)
        ended = wait_for_no_process()
        print(f"{point + 1}: after {seconds:5.1f} s, {how:<14} {ended:5.1f} s until nothing ran; log: {last_line()}", flush=True)
    demo = start()
    code = demo.wait()
    print(f"to the end: exit code {code}; log: {last_line()}")
    return code


def start() -> subprocess.Popen[bytes]:
    LOG.parent.mkdir(exist_ok=True)
    with open(LOG, "ab") as log:
        return subprocess.Popen(["make", "demo"], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def interrupt(demo: subprocess.Popen[bytes], how: str) -> None:
    """Ctrl-C, and SIGKILL here, reach every process of the terminal's group; `make demo-stop` is for another terminal."""
    if how == "make demo-stop":
        subprocess.run(["make", "demo-stop"], check=True, stdout=subprocess.DEVNULL)
    else:
        os.killpg(demo.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    demo.wait(PATIENCE_S)


def wait_for_no_process() -> float:
    """Seconds until no process of this folder is left. Raises TimeoutError, with their commands."""
    started = time.monotonic()
    while processes := remaining():
        if time.monotonic() - started > PATIENCE_S:
            raise TimeoutError(f"still running: {processes}")
        time.sleep(0.5)
    return time.monotonic() - started


def remaining() -> list[str]:
    """Commands of the processes that run in this folder, or below its `.demo`, except this one and its callers."""
    folder, commands = Path.cwd(), list[str]()
    callers = {psutil.Process(), *psutil.Process().parents()}
    for process in psutil.process_iter():
        try:
            directory = Path(process.cwd())
            runs = process not in callers and process.status() != psutil.STATUS_ZOMBIE
            if runs and folder in (directory, *directory.parents):
                commands.append(" ".join(process.cmdline())[:80])
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return commands


def last_line() -> str:
    lines = LOG.read_text(errors="replace").strip().splitlines()
    return lines[-1][:90] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
