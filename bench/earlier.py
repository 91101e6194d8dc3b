"""The build that the benchmarks compare with: its source, taken from git into `.bench/`, beside ours in the same run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from side_by_side import OUT, QUIET, ROOT

EARLIER = "134c529"  # the commit whose figures the issues state


def source(commit: str = EARLIER) -> Path:
    """A folder with `platform/`, `pipelines/` and `jobs/` of a commit. Exits where the clone lacks it (a shallow one does)."""
    folder = OUT / commit
    if not (folder / "platform").is_dir():
        archive = subprocess.run(
            ["git", "archive", commit, "platform", "pipelines", "jobs", "pyproject.toml"], cwd=ROOT, capture_output=True
        )
        if archive.returncode:
            raise SystemExit(f"this clone has no commit {commit} (git fetch --unshallow): {archive.stderr.decode().strip()}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Variables under which Python imports that source instead of ours."""
    return {
        **os.environ,
        **QUIET,
        "PYTHONPATH": os.pathsep.join([str(folder / "platform"), str(folder), str(ROOT / "bench")]),
        **more,
    }


def run(script: str, *arguments: object, folder: Path | None = None, timeout: float = 600, **more: str) -> str:
    """Standard output of `bench/SCRIPT arguments` under the source in `folder` (default: ours). Raises RuntimeError."""
    command = [sys.executable, str(ROOT / "bench" / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment(folder or ROOT, **more), capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout
