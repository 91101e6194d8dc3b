"""`make demo`: writes the data, starts a local Ray cluster, runs the flow through the Jobs API, and prints scores and times.

The cluster ends with this process, however that ends; called again, the flow continues.
"""

from __future__ import annotations

import os
import shlex
import sys
import webbrowser
from pathlib import Path

from voco.demo.flow_run import run_flow
from voco.demo.recipe import DEMO
from voco.errors import exit_code
from voco.job.load import load_job
from voco.job.spec import Job
from voco.report.summary import PAGE, SUMMARY_TEXT
from voco.run import manifest
from voco.store import storage

QUESTION = "what color is at the top left?"
PICTURE = "images/scenes/test/000000.png"


def main() -> int:
    """Run from the repository's root. Returns the flow's exit code."""
    spent: dict[str, float] = {}
    if "VOCO_ENVIRONMENT_S" in os.environ:
        spent["environment"] = float(os.environ["VOCO_ENVIRONMENT_S"])
    job = load_job(DEMO.flow)
    code = run_flow(job, DEMO.flow, DEMO, spent)
    if code == 0:
        print_results(job, spent)
        print_next(job)
    return code


def print_results(job: Job, spent: dict[str, float]) -> None:
    """Seconds by part and by stage, then the scores, and for each pair of methods whether they differ."""
    finished = manifest.read_manifest(job.output_uri)
    assert finished is not None
    print("\nSeconds:")
    stages = finished.statistics["stage_seconds"]
    for part, seconds in [*spent.items(), *((f"  {name}", value) for name, value in stages.items())]:
        print(f"  {part:<24}{seconds:8.1f}")
    for stage in job.stages:
        if stage.kind == "report":
            print("\n" + storage.read_bytes(storage.join(stage.output_uri, SUMMARY_TEXT)).decode())


def print_next(job: Job) -> None:
    """Where the report is, opened where there is a desktop, and three commands to try."""
    page = Path(next(storage.join(stage.output_uri, PAGE) for stage in job.stages if stage.kind == "report"))
    shown = os.path.relpath(page)
    voco = os.path.relpath(Path(sys.executable).with_name("voco"))
    trained = os.path.relpath(storage.join(job.output_uri, "sft/runs/voco-1/train"))
    picture = os.path.relpath(DEMO.data / PICTURE)
    print(f"\nReport: {shown}")
    print("\nTry next:")
    print(f"  {voco} ask {trained} {picture} {shlex.quote(QUESTION)}   # ask the trained model about a picture")
    print(f"  {voco} show {trained}   # a training sample with its mask")
    print(f"  {voco} plan jobs/paper/flow.yaml   # the paper's run on 8 x A100: stages, sizes, memory")
    if sys.stdout.isatty() and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(page.absolute().as_uri())


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
