"""The log that a user reads: one logger with levels, progress on a terminal, and no noise from Ray."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, Any

from voco.errors import Refused

LEVEL = "VOCO_LOG_LEVEL"  # environment variable: one of LEVELS; default: INFO
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

# What Ray, Ray Train and torch print on every healthy run: only lines that are known, so that no error is dropped.
# They stay in Ray's own session logs.
CHATTER = re.compile(
    r"\(TrainController .*(Requesting resources: |(Attempting to start|Started) training worker group|- \(ip=.* world_rank=\d)"
    r"|\(RayTrainWorker .*(Setting up process group for: |Reporting training result \d+: |Checkpoint successfully created at: "
    r"|/c10d_logger\.py:\d+: FutureWarning: )"
    r"|\(RayTrainWorker [^)]*\)(\x1b\[0m)?   return func\(\*args, \*\*kwargs\)"  # below that warning; tracebacks indent by four
    r"|\(raylet\).* \d+ PYTHON worker processes have been started on node"
    r"|Progress bars disabled\. To enable|core_worker\.cc.*max_restarts|logging\.cc.*RAY_BACKEND_LOG_LEVEL"
)
# a warning that Ray takes back by asking again, and the traceback below it
RETRIED = re.compile(r"Failed to send resource request for |Failed to query Ray Train Controller actor state")
ANY_PREFIX = re.compile(r"^(?:\x1b\[\d+m)?(\(\w+ pid=[^)]*\))(?:\x1b\[0m)? ?")
TRACEBACK_LINE = re.compile(
    r"(\s|$|Traceback \(most recent call last\)|During handling of the above|The above exception was|[\w.]+(Error|Exception)\b)"
)
TRAINING_STEP = re.compile(r"^(\S+): step (\d+)/(\d+), (.*)$")  # as `train/watch.py` logs it
TRAINING_END = re.compile(r"^(\S+): ends at step \d+")  # before the last step
WORKER_PREFIX = re.compile(r"^(\x1b\[\d+m)?\((RayTrainWorker|_trial) [^)]*\)(\x1b\[0m)? ")  # Ray's prefix of a worker's line


def above_bars(stream: Any) -> AbstractContextManager[None]:
    """What the block writes to the stream goes above the bars that are drawn on the terminal."""
    bars = sys.modules.get("tqdm")
    return bars.tqdm.external_write_mode(file=stream) if bars else nullcontext()


class _Terminal(logging.StreamHandler[Any]):
    """Messages on stdout; warnings and errors on stderr, with their level first. Streams are looked up for each message."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with above_bars(self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """A closed pipe (`voco run JOB | head`) ends the log, not the job."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def get_logger(name: str) -> logging.Logger:
    """A logger below `voco`, which prints plain lines in drivers and workers alike."""
    root = logging.getLogger("voco")
    if not root.handlers:
        level = os.environ.get(LEVEL, "INFO").upper()
        if level not in LEVELS:
            raise Refused(f"{LEVEL}: expected {', '.join(LEVELS)}, got {level}")
        root.setLevel(level)
        root.addHandler(_Terminal())
        root.propagate = False
    return logging.getLogger(name)


class QuietStream:
    """A text stream that drops lines that match `CHATTER` and prints a worker's lines without Ray's prefix.

    On a terminal the lines of a training's steps become a bar.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._bars = StepBars() if stream.isatty() else None
        self._partial = threading.local()  # per thread: threads print parts of lines in turn
        self._retrying: set[str] = set()  # workers whose last line was a retried warning, or is of its traceback

    def write(self, text: str) -> int:
        pending = getattr(self._partial, "text", "") + text
        *lines, self._partial.text = pending.split("\n")
        for line in lines:
            if not self._is_noise(line):
                self._write_line(WORKER_PREFIX.sub("", line))
        if self._partial.text.startswith("\r"):  # a progress bar redraws its line
            self._stream.write(self._partial.text)
            self._partial.text = ""
        return len(text)

    def _write_line(self, line: str) -> None:
        if self._bars is None:
            self._stream.write(line + "\n")
        elif not self._bars.take(line):
            with above_bars(sys.stdout):
                self._stream.write(line + "\n")

    def _is_noise(self, line: str) -> bool:
        prefix = ANY_PREFIX.match(line)
        worker, text = (prefix[1], line[prefix.end() :]) if prefix else ("", line)
        if worker and RETRIED.search(text):
            self._retrying.add(worker)
            return True
        if worker in self._retrying:
            if TRACEBACK_LINE.match(text):
                return True
            self._retrying.remove(worker)
        return CHATTER.search(line) is not None

    def flush(self) -> None:
        self._stream.write(getattr(self._partial, "text", ""))  # a prompt, or the end of a text without a newline
        self._partial.text = ""
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quiet_ray() -> None:
    """Keep Ray's noise out of this driver's output. Call it once, in a command's own process."""
    sys.stdout, sys.stderr = QuietStream(sys.stdout), QuietStream(sys.stderr)


@contextmanager
def delay_stderr(shown_on_error: bool = True) -> Iterator[None]:
    """Collect what the block writes to file descriptor 2, C++ code included, and pass it through `sys.stderr` afterwards.

    With `shown_on_error` off, what a failed block wrote is only logged for DEBUG: its exception says what was wrong.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    failed = True
    with tempfile.TemporaryFile() as collected:
        os.dup2(collected.fileno(), 2)
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            collected.seek(0)
            text = collected.read().decode(errors="replace")
            if failed and not shown_on_error:
                get_logger(__name__).debug("%s", text)
            else:
                sys.stderr.write(text)


class Progress:
    """Progress of long work: a bar on a terminal, elsewhere a plain line for each update."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self._log = label, get_logger(__name__)
        self._bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            columns, rows = shutil.get_terminal_size()  # 80 x 24 on a terminal without a size, where tqdm prints nothing
            self._bar = tqdm(total=total, initial=done, desc=label, file=sys.stdout, ncols=columns - 1, nrows=rows)

    def update(self, done: int, text: str) -> None:
        """`done` of the total; `text` is the rest of the line."""
        if self._bar is None:
            self._log.info("%s: %s", self.label, text)
            return
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class StepBars:
    """A bar on the terminal for each training, from the lines of its steps."""

    def __init__(self) -> None:
        self._bars: dict[str, Progress] = {}

    def take(self, line: str) -> bool:
        """Show a line in its bar; False for a line about anything else, which is not shown."""
        if match := TRAINING_END.match(line):
            self._close(match[1])
        match = TRAINING_STEP.match(line)
        if match is None:
            return False
        name, done, total, figures = match[1], int(match[2]), int(match[3]), match[4]
        if name not in self._bars:
            self._bars[name] = Progress(name, total, done)
        self._bars[name].update(done, figures)
        if done == total:
            self._close(name)
        return True

    def _close(self, name: str) -> None:
        if name in self._bars:
            self._bars.pop(name).close()
