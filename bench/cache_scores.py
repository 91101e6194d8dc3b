"""`make cache-scores`: one video checkpoint that answers from frame caches of each number type: score and bytes of each.

By default the checkpoint and the test clips of a finished `make demo`. It runs a flow of a frame_cache and an evaluate stage for
each type, under `.bench/cache-scores`; called again, it continues there. The caches of type `model` have the model's own numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from side_by_side import OUT, QUIET, ROOT

TYPES = ("model", "bf16", "int8", "fp8")


def flow(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    stages: list[dict[str, Any]] = []
    samples = [{"uri": str(options.samples.resolve())}]
    for name in TYPES:
        block = {"fps": options.fps, "unit_samples": 50, **({} if name == "model" else {"dtype": name})}
        inputs = {"samples": samples, "checkpoint": str(options.compressor.resolve())}
        stages.append({"name": f"frames-{name}", "kind": "frame_cache", "inputs": inputs, "frame_cache": block})
        inputs = {"samples": samples, "frame_cache": f"@frames-{name}", "checkpoint": str(options.checkpoint.resolve())}
        evaluate = {"benchmark": options.benchmark, "unit_samples": 50}
        stages.append({"name": f"answers-{name}", "kind": "evaluate", "inputs": inputs, "evaluate": evaluate})
    tracking = {"wandb": False}
    return {
        "name": "cache-scores", "kind": "flow", "output": str(output), "resources": {"workers": 2}, "tracking": tracking,
        "flow": {"stages": stages},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = ROOT / ".demo" / "run"
    parser.add_argument("--checkpoint", type=Path, default=demo / "video", help="what answers")
    parser.add_argument("--compressor", type=Path, default=demo / "sft/runs/voco-1/train", help="what makes the caches")
    parser.add_argument("--samples", type=Path, default=demo / "clips-test", help="an ingested test set of videos")
    parser.add_argument("--benchmark", default="clips")
    parser.add_argument("--fps", type=float, default=1.0)
    parser.add_argument("--work", type=Path, default=OUT / "cache-scores")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    file, output = options.work / "flow.yaml", options.work.resolve() / "run"
    file.write_text(yaml.safe_dump(flow(options, output), sort_keys=False))
    environment = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    subprocess.run([sys.executable, "-m", "pipelines", "run", str(file.resolve())], cwd=ROOT, env=environment, check=True)
    own: dict[tuple[str, int], str] = {}
    print(f"{'numbers':8} {'score %':>8} {'95 %':>15} {'answers as model':>17} {'bytes a frame':>14} {'on disk':>10}")
    for name in TYPES:
        answers = pq.read_table(output / f"answers-{name}" / "answers").to_pylist()
        texts = {(row["sample_id"], row["conversation_index"]): row["prediction"] for row in answers}
        own = own or texts
        same = sum(texts[key] == text for key, text in own.items()) / len(own)
        rows = pq.read_table(output / f"answers-{name}" / "scores").to_pylist()
        score = next(row for row in rows if row["category"] == "all")
        manifest = json.loads((output / f"frames-{name}" / "manifest.json").read_text())
        sizes = manifest["statistics"]
        interval = f"{100 * score['score_low']:.1f} to {100 * score['score_high']:.1f}"
        figures = f"{100 * score['score']:8.2f} {interval:>15} {same:17.1%} {sizes['bytes_per_frame']:14,}"
        print(f"{name:8} {figures} {sizes['stored_bytes_per_frame']:10,.0f}")


if __name__ == "__main__":
    main()
