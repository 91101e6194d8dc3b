"""Stops the demo's Ray cluster when the process that started it ends, however that happens.

`stop_with_this_process` starts a small process that waits for the end of a pipe. The kernel closes the pipe when its writer
ends, also after SIGKILL; the small process is in another session, so that Ctrl-C in the terminal does not reach it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from voco.demo import cluster


def stop_with_this_process(folder: Path = cluster.FOLDER) -> subprocess.Popen[Any]:
    """Start the guard of the folder's cluster, which may start later. Closing the result's stdin stops the cluster at once."""
    cluster.write_owner(folder)
    with open(folder / "guard.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "voco.demo.guard", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def main(folder: Path) -> None:
    """Wait until nobody can write to stdin any more, then stop the cluster."""
    sys.stdin.buffer.read()
    cluster.stop(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
