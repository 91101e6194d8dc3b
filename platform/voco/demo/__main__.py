"""`make demo`: writes the data, starts a local Ray cluster, runs the flow through the Jobs API, and prints scores and times."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from voco.commands import submit
from voco.commands.cluster import find_cluster
from voco.demo import cluster
from voco.errors import exit_code
from voco.job.load import load_job
from voco.job.spec import Job
from voco.report import table
from voco.report.summary import PAGE, SUMMARY_FILE
from voco.run import manifest
from voco.store import storage
from voco.store.schemas import ALL

FLOW = "jobs/demo/flow.yaml"
DATA = Path(".demo/data")


def main() -> int:
    """Run from the repository's root. Returns the flow's exit code."""
    spent: dict[str, float] = {}
    if "VOCO_ENVIRONMENT_S" in os.environ:
        spent["environment"] = float(os.environ["VOCO_ENVIRONMENT_S"])
    timed(spent, "data", write_demo_data)
    job = load_job(FLOW)
    if submit.output_is_finished(job, manifest.job_run_id(job)):
        print(f"The demo is done already: {job.output}")
        code = 0
    else:
        with peak_memory() as peak:
            target = find_cluster(timed(spent, "Ray start", cluster.start).dashboard)
            code = timed(spent, "flow", lambda: submit.submit(FLOW, job, target))
        print(f"\nPeak memory: {peak[0] / 2**30:.1f} GiB above the machine's use before Ray started")
    if code == 0:
        print_results(job, spent)
    return code


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yields [bytes]: the machine's peak memory use inside the block above that at its start, sampled every second."""
    before, peak, ended = psutil.virtual_memory().used, [0], threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            peak[0] = max(peak[0], psutil.virtual_memory().used - before)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield peak
    finally:
        ended.set()


def write_demo_data() -> None:
    """Write the demo's datasets in the file formats of real ones; data that exists is not written again."""
    from voco.demo import write

    write.write_data(DATA)


def timed(spent: dict[str, float], part: str, call: Callable[[], Any]) -> Any:
    """What `call` returns. Its seconds are added to `spent` under the name `part`."""
    started = time.monotonic()
    try:
        return call()
    finally:
        spent[part] = time.monotonic() - started


def print_results(job: Job, spent: dict[str, float]) -> None:
    """Seconds by part and by stage, the scores, and the report's path."""
    finished = manifest.read_manifest(job.output_uri)
    assert finished is not None
    print("\nSeconds:")
    stages = finished.statistics["stage_seconds"]
    for part, seconds in [*spent.items(), *((f"  {name}", value) for name, value in stages.items())]:
        print(f"  {part:<24}{seconds:8.1f}")
    for stage in job.stages:
        if stage.kind == "report":
            output = stage.output_uri
            summary = storage.read_json(storage.join(output, SUMMARY_FILE))
            print(f"\n{table.text_tables([row for row in summary if row['category'] == ALL])}")
            print(f"\nReport: {storage.join(output, PAGE)}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
