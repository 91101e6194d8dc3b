"""What a job can end with besides success, and the exit code of each."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Refused(Exception):
    """A mistake of the user, in one line that says what to change. Exit code 2."""


class JobFailed(Exception):
    """The job ran and failed. Exit code 1."""


class Stopped(Exception):
    """The job ended early and cleanly because it was asked to; sent again, it continues. Exit code 130."""


def one_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def exit_code(call: Callable[[], int]) -> int:
    """What `call` returns, or the exit code of the error that it ends with, told in one line on stderr."""
    try:
        return call()
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except JobFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt) as error:
        print(f"stopped: {error or 'at once'}", file=sys.stderr)
        return 130
