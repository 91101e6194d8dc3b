"""The table of metrics: cases by hand of each rule, its published figure, and what a comparison with lmms-eval leaves.

    python bench/metric_table.py                       cases and figures; the comparison is `not run`
    python bench/metric_table.py --peer PEER/python    PEER has lmms-eval and pytest (tests/evaluate/metrics/test_lmms_eval.py)

Cases are counted in the tables that the tests run; the comparison is the test itself, run in the peer's environment, which fails
at a difference without a listed reason.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests")]

from voco.evaluate.metrics import Metric, get_metric  # noqa: E402
from voco.job.tables import METRICS  # noqa: E402

LINE = re.compile(r"^(\w+): (\d+) answers, (\d+) marks differ: (\{.*\})$", re.MULTILINE)
COMPARISON = "tests/evaluate/metrics/test_lmms_eval.py"


def case_count(name: str) -> int:
    """Cases in the rule's table: `tests/evaluate/metrics/test_NAME.py`, for boxes `tests/evaluate/test_box_iou.py`."""
    folder = "evaluate" if name == "box_iou" else "evaluate.metrics"
    return len(importlib.import_module(f"{folder}.test_{name}").CASES)


def disagreements(python: str) -> dict[str, tuple[int, dict[str, int]]]:
    """By metric: how many answers were compared, and how many marks differ for each reason. Ends when one has no reason."""
    path = os.pathsep.join([str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")])
    command = [python, "-m", "pytest", "--noconftest", "-s", "-q", "-p", "no:cacheprovider", COMPARISON]
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    by_metric = {name: (int(count), ast.literal_eval(reasons)) for name, count, _, reasons in LINE.findall(done.stdout)}
    if done.returncode != 0 or not by_metric:
        sys.exit(f"{COMPARISON} failed in {python}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return by_metric


def figure_text(metric: Metric) -> str:
    return metric.headline + (" (the mean mark)" if metric.publishes_mean else "")


def table(peer: dict[str, tuple[int, dict[str, int]]] | None) -> str:
    """A row of Markdown for each metric of ours."""
    lines = ["| metric | published figure | cases | compared | marks differ | because |", "|---|---|---|---|---|---|"]
    for name in (name for name, row in METRICS.items() if row.module is None):
        compared, differ, why = "not run", "", ""
        if peer is not None:
            count, reasons = peer.get(name, (0, {}))
            compared, differ = (f"{count:,}", f"{sum(reasons.values()):,}") if count else ("no", "")
            why = "; ".join(f"{number:,}: {reason}" for reason, number in sorted(reasons.items(), key=lambda item: -item[1]))
        lines.append(f"| `{name}` | {figure_text(get_metric(name))} | {case_count(name)} | {compared} | {differ} | {why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The table of metrics, in Markdown.")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has lmms-eval and pytest")
    options = parser.parse_args()
    print(table(disagreements(options.peer) if options.peer else None))
