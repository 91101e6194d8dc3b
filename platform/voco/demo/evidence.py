"""`make evidence`: the long recipe behind docs/results.md, once for each seed, and the scores over all seeds.

The flow is the demo's, with more data, more positions and longer training. Tables and features do not depend on the seed and are
written once, under `.evidence/shared`. Called again, it continues where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from voco.demo.flow_run import run_flow
from voco.demo.recipe import DEMO, EVIDENCE
from voco.errors import exit_code
from voco.job.load import load_job
from voco.job.trials import with_values
from voco.report.summary import SUMMARY_FILE
from voco.store import storage
from voco.store.schemas import ALL

SHARED_KINDS = ("ingest", "features")
TOWER = {"name": "efficientnet_lite0", "image_size": 128}
TRAINING = {"epochs": 3, "global_batch": 32, "micro_batch": 16, "learning_rate": 0.001, "weight_decay": 0.01, "adam_beta2": None}
# What differs from the demo's flow, by stage: {dotted key: value}
CHANGES: dict[str, dict[str, Any]] = {
    "features": {"features.tower": TOWER, "features.unit_images": 1000},
    "align": {
        "model.tower": TOWER,
        **{f"model.llama.{key}": value for key, value in {"heads": 4, "kv_heads": 4, "mlp_width": 384}.items()},
        "resources.workers": 2,
        **{f"align.{key}": value for key, value in TRAINING.items()},
        "align.epochs": 2,
    },
    "base": {f"image_sft.{key}": value for key, value in TRAINING.items()},
    "sft": {
        "sweep.train.inputs.samples": [{"uri": "@scenes"}],
        **{f"sweep.train.image_sft.{key}": value for key, value in TRAINING.items()},
    },
    "video": {**{f"video_sft.{key}": value for key, value in TRAINING.items()}, "video_sft.epochs": 16},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the new models and of the order (default: 0)")
    seeds: list[int] = parser.parse_args().seeds
    for seed in seeds:
        file = write_job_file(seed)
        print(f"Seed {seed}: {file}", flush=True)
        code = run_flow(load_job(file), file, EVIDENCE, {})
        if code:
            return code
    print("\n".join(seed_lines(seeds)))
    return 0


def seed_output(seed: int) -> str:
    return str(EVIDENCE.folder / f"seed-{seed}")


def write_job_file(seed: int) -> str:
    """Write the flow of one seed, and return the file's path."""
    content = seed_job(yaml.safe_load(Path(DEMO.flow).read_text()), seed)
    file = EVIDENCE.folder / f"seed-{seed}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(file)


def seed_job(demo: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The content of one seed's job file, from that of the demo's flow."""
    stages = []
    for stage in demo["flow"]["stages"]:
        changed = with_values(stage, CHANGES.get(stage["name"], {}))
        if stage["kind"] in SHARED_KINDS:
            changed["output"] = str(EVIDENCE.folder / "shared" / stage["name"])
        else:
            changed["seed"] = seed
        if stage["kind"] == "sweep":
            changed["sweep"]["train"]["seed"] = seed
        stages.append(changed)
    content = {**demo, "name": f"evidence-{seed}", "output": seed_output(seed), "flow": {"stages": stages}}
    moved: dict[str, Any] = json.loads(json.dumps(content).replace(f"{DEMO.data}/", f"{EVIDENCE.data}/"))
    return moved


def seed_lines(seeds: Sequence[int]) -> list[str]:
    """Mean and range of each score over the seeds: one line for each benchmark, method and N."""
    scores: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for seed in seeds:
        for row in storage.read_json(storage.join(seed_output(seed), "report", SUMMARY_FILE)):
            if row["category"] == ALL:
                scores[row["benchmark"], row["method"], row["n"]].append(100 * row["score"])
    lines = [f"{'benchmark':<12}{'method':<18}{'N':>4}{'mean %':>9}{'lowest':>9}{'highest':>9}{'seeds':>7}"]
    for (benchmark, method, n), values in scores.items():
        figures = f"{statistics.mean(values):>9.1f}{min(values):>9.1f}{max(values):>9.1f}{len(values):>7}"
        lines.append(f"{benchmark:<12}{method:<18}{n:>4}{figures}")
    return lines


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
