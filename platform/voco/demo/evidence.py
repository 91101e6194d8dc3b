"""`make evidence`: the long recipe behind docs/results.md, once for each seed, and the scores over all seeds.

The flow is the demo's, with more data, more positions, longer training and more methods; with `--data` the same follows for real
photos. Tables and features do not depend on the seed and are written once, under `.evidence/shared`. Called again, it continues
where it was.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from voco.demo.evidence_flow import photos_job, scenes_job, seed_output
from voco.demo.flow_run import run_flow
from voco.demo.photos import write_photos
from voco.demo.recipe import DEMO, EVIDENCE
from voco.errors import exit_code
from voco.job.load import load_job
from voco.report.summary import SUMMARY_FILE
from voco.store import storage
from voco.store.schemas import ALL

JOBS = {"scenes": scenes_job, "photos": photos_job}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the new models and of the order (default: 0)")
    parser.add_argument("--data", type=Path, help="the folder of GroceryStoreDataset: the same on its photos")
    options = parser.parse_args()
    sets = ["scenes"] if options.data is None else ["scenes", "photos"]
    if options.data is not None:
        write_photos(options.data, EVIDENCE.data)
    for seed in options.seeds:
        for data in sets:
            file = write_job_file(seed, data)
            print(f"Seed {seed}, {data}: {file}", flush=True)
            code = run_flow(load_job(file), file, EVIDENCE, {})
            if code:
                return code
    for data in sets:
        print("\n".join(seed_lines(options.seeds, data)))
    return 0


def write_job_file(seed: int, data: str = "scenes") -> str:
    """Write the flow of one seed and data set, and return the file's path."""
    content = JOBS[data](yaml.safe_load(Path(DEMO.flow).read_text()), seed)
    file = EVIDENCE.folder / f"{content['name']}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(file)


def seed_lines(seeds: Sequence[int], data: str = "scenes") -> list[str]:
    """Mean and range of each score over the seeds: one line for each evaluation and N."""
    scores: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for seed in seeds:
        rows: list[dict[str, Any]] = storage.read_json(storage.join(seed_output(seed, data), "report", SUMMARY_FILE))
        for row in rows:
            if row["category"] == ALL:
                scores[row["benchmark"], row["stage"], row["n"]].append(100 * row["score"])
    lines = [f"{'benchmark':<12}{'evaluation':<36}{'N':>4}{'mean %':>9}{'lowest':>9}{'highest':>9}{'seeds':>7}"]
    for (benchmark, stage, n), values in scores.items():
        figures = f"{statistics.mean(values):>9.1f}{min(values):>9.1f}{max(values):>9.1f}{len(values):>7}"
        lines.append(f"{benchmark:<12}{stage:<36}{n:>4}{figures}")
    return lines


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
