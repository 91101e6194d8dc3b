"""Seconds that a training loses to each kind of interruption, on nodes of this machine that come and go.

    python bench/interruptions.py [--rounds 1]

Of each: from the event to the first step beyond those that were done before it, and how many steps were done again. A resize is
counted from the step at which the workers left, not from the node's arrival. The start of Ray's processes and of torch is most of
it, so it is mostly seconds of a CPU. A table, and no limits. tests/cluster/test_interruptions.py proves the same run right.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests"), str(ROOT)]

import side_by_side  # noqa: E402
from elastic_world import INTERRUPTIONS, RANGE, SAVE_EVERY, elastic_cluster, interrupt, lost_seconds  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    os.environ.update(side_by_side.QUIET)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    load = os.getloadavg()[0]
    rounds = [interrupted_run() for _ in range(options.rounds)]
    print(f"{'interruption':<16} {'lost s':>8} {'steps done again':>18}")
    for how in INTERRUPTIONS:
        seconds = statistics.median(result[how][0] for result in rounds)
        print(f"{how:<16} {seconds:8.1f} {max(result[how][1] for result in rounds):18d}", flush=True)
    work = f"a tiny model on 1 to 2 workers of a CPU each, a checkpoint every {SAVE_EVERY} steps"
    own = {how: statistics.median(result[how][0] for result in rounds) for how in INTERRUPTIONS}
    side_by_side.write("interruptions", work, own, {}, {}, load)
    return 0


def interrupted_run() -> dict[str, tuple[float, int]]:
    """One training through every interruption: seconds lost and steps done again."""
    with tempfile.TemporaryDirectory(prefix="voco-") as folder, elastic_cluster(Path(folder)) as elastic:
        elastic.add_node()
        elastic.add_node()
        elastic.wait_for_nodes(2)
        driver = elastic.start("run", RANGE)
        elastic.wait_for_step("run", 2 * SAVE_EVERY, driver)
        happened = {}
        for how in INTERRUPTIONS:
            attempt = elastic.attempt("run")
            happened[how], driver = interrupt(elastic, "run", how, driver)
            elastic.wait_for_restart("run", attempt, driver)
            print(f"  {how}: the workers have started again", flush=True)
        elastic.stop("run", driver)
        rows = elastic.metrics("run")
    return {how: lost_seconds(rows, when) for how, when in happened.items()}


if __name__ == "__main__":
    raise SystemExit(main())
