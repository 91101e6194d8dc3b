"""`make bench-checkpoint`: seconds that a training waits for a save, a checkpoint's bytes, a load; the build of 134c529 beside.

python bench/checkpoint.py [--rounds 3]

One rank with 60 M trained and 60 M frozen weights in fp32 under ZeRO-2, on the local disk. Each contender is a fresh process.
What each loads is compared with what it saved, bit by bit. Limits: `blocked` at most 0.1, `bytes` at most 1.02.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import earlier
from side_by_side import in_turn, median, write

KEYS = ("first_blocked_s", "blocked_s", "complete_s", "step_s", "step_while_saving_s", "load_s", "bytes")


def contender(folder: Path | None) -> dict[str, Any]:
    target = tempfile.mkdtemp(prefix="voco-bench-")
    try:
        printed = earlier.run("checkpoint_run.py", target, folder=folder)
        return dict(json.loads(printed.strip().rsplit("\n", 1)[-1]))
    finally:
        shutil.rmtree(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds, load = parser.parse_args().rounds, os.getloadavg()[0]
    results = in_turn({"ours": partial(contender, None), earlier.EARLIER: partial(contender, earlier.source())}, rounds)
    own, before = ({key: median(results[name], key) for key in KEYS} for name in ("ours", earlier.EARLIER))
    state = median(results["ours"], "state_bytes")
    figures = {"blocked": own["blocked_s"] / before["blocked_s"], "bytes": own["bytes"] / state}
    ratio = {
        "seconds a save blocks": before["blocked_s"] / own["blocked_s"],
        "of them in the first save": before["first_blocked_s"] / own["first_blocked_s"],
        "bytes": before["bytes"] / own["bytes"],
        "seconds to load": before["load_s"] / own["load_s"],
    }
    work = "a checkpoint of 60 M trained and 60 M frozen weights, fp32, ZeRO-2, one rank, local disk; equal weights after loading"
    write("checkpoint", work, own, {earlier.EARLIER: before}, ratio, load, figures)


if __name__ == "__main__":
    main()
