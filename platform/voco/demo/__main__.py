"""`make demo`: real data, the demo's own Ray cluster, the whole flow through the Jobs API, and where the time went."""

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
from voco.demo import cluster
from voco.errors import exit_code
from voco.job import spec
from voco.report import table
from voco.run import manifest
from voco.store import storage

FLOW = "jobs/demo/flow.yaml"
DATA = Path(".demo/data")


def main() -> int:
    """Runs from the repository's root. Returns the flow's exit code."""
    spent: dict[str, float] = {}
    if "VOCO_ENVIRONMENT_S" in os.environ:
        spent["environment"] = float(os.environ["VOCO_ENVIRONMENT_S"])
    timed(spent, "data", write_demo_data)
    job = spec.load_job(FLOW)
    if submit.output_is_finished(job, manifest.job_run_id(job)):
        print(f"everything is done already: {job.output}")
        code = 0
    else:
        with peak_memory() as peak:
            where = submit.find_cluster(timed(spent, "Ray start", cluster.start).dashboard)
            code = timed(spent, "flow", lambda: submit.submit(FLOW, job, where))
        print(f"\npeak memory: {peak[0] / 2**30:.1f} GiB more than the machine used before Ray started")
    if code == 0:
        print_end(job, spent)
    return code


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Holds the most memory, in bytes, that the machine uses in here beyond what it did at the start; sampled each second."""
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
    """The four datasets in their own file formats; nothing is written twice."""
    from voco.demo import write

    write.write_data(DATA)


def timed(spent: dict[str, float], part: str, call: Callable[[], Any]) -> Any:
    started = time.monotonic()
    try:
        return call()
    finally:
        spent[part] = time.monotonic() - started


def print_end(job: spec.Job, spent: dict[str, float]) -> None:
    """Seconds by part and by stage, the scores, and the report's path."""
    output = storage.resolve(job.output)
    done = manifest.read_manifest(output)
    assert done is not None
    assert job.flow is not None
    print("\nseconds")
    stages = done.statistics["stage_seconds"]
    for part, seconds in [*spent.items(), *((f"  {name}", value) for name, value in stages.items())]:
        print(f"  {part:<24}{seconds:8.1f}")
    for stage in job.flow.stages:
        if stage.kind == "report":
            place = storage.resolve(stage.output)
            summary = storage.read_json(storage.join(place, "summary.json"))
            print(f"\n{table.text_tables([row for row in summary if row['category'] == 'all'])}")
            print(f"\nreport: {storage.join(place, 'report.html')}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
