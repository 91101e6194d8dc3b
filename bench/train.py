"""`make bench-train`: Ray Train with our loop, and a bare DeepSpeed loop over the same samples: seconds of a step.

python bench/train.py [--rounds 3]

Both are fresh processes, in turn, one worker with one thread, at the demo's shapes. The bare loop is `bench/train_run.py`: the
same model, batches and engine, and in each step nothing but forward, backward and `engine.step()`. Its batches are ready before
the clock starts; ours are read, tokenised and collated by the loop's own thread meanwhile. Losses are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from side_by_side import OUT, QUIET, ROOT, median, write
from step_run import MODEL, TRAINING, conversations

from voco.demo.cluster import KEEP_FREED_MEMORY

IMAGES, EPOCHS, WARM = 480, 4, 10  # steps that do not count


def write_world(folder: Path) -> None:
    """Drawn images and LLaVA rows, nine questions each."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number:04d}.png")
        for index, (question, answer) in enumerate(conversations(number)):
            turns = [
                {"from": "human", "value": f"<image>\n{question['text']}"},
                {"from": "gpt", "value": answer["text"]},
            ]
            rows.append({"id": f"{number}-{index}", "image": f"{number:04d}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    common = {"resources": {"workers": 1}, "tracking": {"wandb": False}}
    samples = [{"uri": str(folder / "samples"), "weight": 1.0}]
    block = {**TRAINING, "epochs": EPOCHS, "text": {"template": "question_answer"}, "save_every": 10_000}
    return {
        "samples": {
            "name": "samples", "kind": "ingest", "output": str(folder / "samples"), **common,
            "inputs": {"annotations": str(folder / "rows.json"), "media": str(folder / "images")},
            "ingest": {"format": "llava_json", "dataset": "bench"},
        },
        "features": {
            "name": "features", "kind": "features", "output": str(folder / "features"), **common, "inputs": {"samples": samples},
            "features": {"tower": MODEL["tower"]},
        },
        "train": {
            "name": "train", "kind": "image_sft", **common, "model": MODEL, "compression": {"method": "voco", "tokens": 1},
            "inputs": {"samples": samples, "features": str(folder / "features")}, "image_sft": block,
        },
    }  # fmt: skip


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **kept,
        **QUIET,
        **KEEP_FREED_MEMORY,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "platform", ROOT, ROOT / "bench"))),
    }


def run_job(folder: Path, job: dict[str, Any]) -> None:
    path = folder / f"{job['name']}.yaml"
    path.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "pipelines", "run", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job['name']}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def with_ray(folder: Path, job: dict[str, Any], round_: int) -> tuple[dict[str, float], list[float]]:
    """Median seconds of a step of a training on Ray Train, and its losses."""
    import pyarrow.parquet as pq

    output = folder / f"train-{round_}"
    run_job(folder, {**job, "output": str(output)})
    metrics = pq.read_table(output / "metrics.parquet")
    return {"step_s": statistics.median(metrics["seconds"].to_pylist()[WARM:])}, metrics["loss"].to_pylist()


def bare(folder: Path, round_: int) -> tuple[dict[str, float], list[float]]:
    """The same for the bare loop, which starts from the same initial model."""
    command = [
        sys.executable,
        str(ROOT / "bench/train_run.py"),
        str(folder / f"train-{round_}/initial"),
        str(folder / "train.yaml"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the bare loop: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    return {"step_s": statistics.median(result["seconds"][WARM:])}, result["losses"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    results: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory(dir=OUT) as scratch:
        folder = Path(scratch)
        write_world(folder)
        work = jobs(folder)
        run_job(folder, work["samples"])
        run_job(folder, work["features"])
        for round_ in range(options.rounds):
            own, losses = with_ray(folder, work["train"], round_)
            peer, peer_losses = bare(folder, round_)
            apart = max(abs(a - b) / b for a, b in zip(losses, peer_losses, strict=True))
            print(
                f"  round {round_ + 1}/{options.rounds}: ours {own}, bare {peer}, {len(losses)} losses within {apart:.1e}",
                flush=True,
            )
            if apart > 1e-5:
                raise SystemExit("the two do not train the same")
            results["ours"].append(own)
            results["bare"].append(peer)
    seconds = {name: median(runs, "step_s") for name, runs in results.items()}
    ratio = seconds["ours"] / seconds["bare"]
    write(
        "train",
        f"a step of the demo's model, {TRAINING['global_batch']} images of {len(conversations(0))} questions, fp32, one thread",
        {"step_s": seconds["ours"]},
        {"bare DeepSpeed loop": {"step_s": seconds["bare"]}},
        {"time of a bare DeepSpeed loop": ratio},
        load,
        {"ours_over_bare": ratio},
    )


if __name__ == "__main__":
    main()
