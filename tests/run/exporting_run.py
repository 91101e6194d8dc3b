"""A driver that runs features and a training on a local Ray and scrapes that node's endpoint meanwhile.

It writes FOLDER/series.json: `seen`, the last value of each series; `left`, the series when both had ended; `idle`, those of a
stage that sets nothing for a while.

    RAY_metrics_report_interval_ms=4000 python exporting_run.py FOLDER 4
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import world
from prometheus_client.parser import text_string_to_metric_families

import pipelines
from voco.run.prometheus import stage_metrics
from voco.run.ray_init import start_ray

Series = dict[str, tuple[str, float, dict[str, str]]]


def scrape(port: int) -> Series:
    """Every series of the node: its last value and labels by its name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = (sample for family in families for sample in family.samples)
    return {f"{sample.name}{sorted(sample.labels.items())}": (sample.name, sample.value, sample.labels) for sample in samples}


def run_jobs(root: str) -> None:
    world.write_samples(f"{root}/samples", world.sample_rows(40))
    pipelines.run(world.features_job([f"{root}/samples"], f"{root}/features"))
    pipelines.run(world.sft_job(f"{root}/samples", f"{root}/features", f"{root}/trained", epochs=80))


def main(root: str, interval_s: float) -> dict[str, Any]:
    start_ray(cpus=2)
    import ray  # not earlier: Ray reads its authentication mode from the environment when it is imported

    port = ray.nodes()[0]["MetricsExportPort"]
    seen: Series = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(interval_s / 4):
            seen.update(scrape(port))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        run_jobs(root)
    finally:
        ended.set()
    watching.join()
    deadline = time.monotonic() + 60
    left = scrape(port)
    while any("ray_voco_" in name for name in left) and time.monotonic() < deadline:
        time.sleep(0.5)
        left = scrape(port)
    with stage_metrics("idle", "idle-1", "ingest") as stage:
        stage.count_rows(10, 9, {"corrupt_media": 1})
        time.sleep(4 * interval_s)
        idle = scrape(port)
    return {"seen": list(seen.values()), "left": list(left.values()), "idle": list(idle.values())}


if __name__ == "__main__":
    outcome = main(sys.argv[1], float(sys.argv[2]))
    (Path(sys.argv[1]) / "series.json").write_text(json.dumps(outcome))
