"""How a job can end other than in success, with the exit code of each."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable


class Refused(Exception):
    """A user's mistake, in one line that says what to change. Exit code 2."""


class JobFailed(Exception):
    """The job ran and failed. Exit code 1."""


class Stopped(Exception):
    """The job ended early and cleanly because the user stopped it; submitted again, it continues. Exit code 130."""


def one_line(error: BaseException) -> str:
    """An exception's type and message, in one line of at most 200 characters."""
    return _single_line(f"{type(error).__name__}: {error}", 200)


def message_line(error: BaseException, limit: int = 200) -> str:
    """An exception's message, in one line of at most `limit` characters."""
    return _single_line(str(error), limit)


def _single_line(text: str, limit: int) -> str:
    """One line without memory addresses, so that the same error has the same text in every run."""
    return " ".join(re.sub(r" at 0x[0-9a-fA-F]+", "", text).split())[:limit]  # Pillow writes capitals


def exit_code(call: Callable[[], int]) -> int:
    """The result of `call`, or the exit code of the error that ended it, which is printed on stderr in one line."""
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
