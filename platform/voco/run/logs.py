"""The log that a user reads: one logger with levels, progress on a terminal, and none of Ray's own chatter."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from typing import IO, Any

LEVEL = "VOCO_LOG_LEVEL"  # environment variable: DEBUG, INFO (the default), WARNING or ERROR

# What Ray, Ray Train and torch print on every healthy run. The lines stay in Ray's own session logs.
CHATTER = re.compile(
    r"\(PlacementGroupCleaner |\(TrainController |\(RayTrainWorker .*(Setting up process group|Reporting training result"
    r"|Checkpoint successfully created|FutureWarning|return func\(\*args)|Progress bars disabled|core_worker\.cc.*max_restarts"
)
WORKER_PREFIX = re.compile(r"^(\x1b\[\d+m)?\((RayTrainWorker|_trial) [^)]*\)(\x1b\[0m)? ")  # of Ray, before a worker's line


class _Terminal(logging.StreamHandler[Any]):
    """Messages on stdout; warnings and errors on stderr, with their level first. Streams are looked up for each message."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        super().emit(record)


def get_logger(name: str) -> logging.Logger:
    """A logger below `voco`, which prints plain lines in drivers and workers alike."""
    root = logging.getLogger("voco")
    if not root.handlers:
        root.addHandler(_Terminal())
        root.setLevel(os.environ.get(LEVEL, "INFO").upper())
        root.propagate = False
    return logging.getLogger(name)


class QuietStream:
    """A text stream that drops whole lines of `CHATTER` and shows a worker's own lines without Ray's prefix."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._partial = threading.local()  # threads print parts of lines by turns

    def write(self, text: str) -> int:
        pending = getattr(self._partial, "text", "") + text
        *lines, self._partial.text = pending.split("\n")
        for line in lines:
            if not CHATTER.search(line):
                self._stream.write(WORKER_PREFIX.sub("", line) + "\n")
        if self._partial.text.startswith("\r"):  # a progress bar redraws its line
            self._stream.write(self._partial.text)
            self._partial.text = ""
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quiet_ray() -> None:
    """Keep Ray's chatter out of this driver's output. Call once, in a command's own process."""
    sys.stdout, sys.stderr = QuietStream(sys.stdout), QuietStream(sys.stderr)


class Progress:
    """How far long work is: a bar on a terminal, elsewhere a plain line for each update."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self._log = label, get_logger(__name__)
        self._bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=label, file=sys.stdout, leave=True)

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
