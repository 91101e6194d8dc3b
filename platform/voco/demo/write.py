"""All of the demo's source data: `python -m voco.demo.write OUT`, or `OUT evidence` for the long recipe's.

A second call writes nothing. Each part has the file format of a real dataset: LLaVA's JSON (scenes), CC3M's chat.json with
images.zip (captions), WebVid's CSV and Video-ChatGPT's JSON with mp4 files (clips).
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

from voco.demo import captions, clips
from voco.demo.recipe import DEMO, EVIDENCE, Recipe
from voco.errors import JobFailed

PR_SET_PDEATHSIG = 1  # of prctl(2)


def write_data(out: Path, recipe: Recipe) -> None:
    """Write the parts that do not exist yet. The data depend only on the packages' images and fixed seeds."""
    sizes = [f"--train-scenes={recipe.train_scenes}", f"--test-scenes={recipe.test_scenes}", f"--val-scenes={recipe.val_scenes}"]
    command = [sys.executable, "-m", "voco.demo.scenes", str(out), *sizes, *(["--describe"] if recipe.describe else [])]
    with subprocess.Popen(command, preexec_fn=_end_with_parent) as scenes:  # the other half of the work, on another core
        captions.write_captions(out, recipe.captions)
        clips.write_clips(out, recipe.train_clips, recipe.test_clips, recipe.webvid_clips)
    if scenes.returncode:
        raise JobFailed(f"the scenes were not written: `{' '.join(command[1:])}` ended with {scenes.returncode}")


def _end_with_parent() -> None:
    """In a new process: let the kernel end it when its parent ends, also by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    write_data(Path(sys.argv[1]), EVIDENCE if sys.argv[2:] == ["evidence"] else DEMO)
