"""A small finished flow: real samples, metrics, answers, scores and manifests, with made-up learning curves."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapes
import world
from PIL import Image, ImageDraw

from voco.evaluate.metrics import get_metric
from voco.evaluate.metrics.gqa import exact_match
from voco.evaluate.scores import score_rows
from voco.job.load import build_job
from voco.job.spec import Job
from voco.run import manifest
from voco.store import parquet, schemas, storage

SCENES = 120
COLOURS = ("red", "blue", "green", "yellow")
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png> \x1b[31m & \"quoted\""
TOWER = shapes.tower(image_size=224)
LLAMA = shapes.llama(heads=2, mlp_width=64, vocabulary=400)
SFT = {"epochs": 1, "global_batch": 2, "micro_batch": 2, "learning_rate": 1e-3}


def scene(index: int) -> tuple[bytes, list[str]]:
    """A PNG of 2 x 2 coloured shapes, and the colours."""
    generator = np.random.default_rng(index)
    colours = [COLOURS[pick] for pick in generator.integers(len(COLOURS), size=4)]
    image = Image.new("RGB", (128, 128), (244, 240, 230))
    draw = ImageDraw.Draw(image)
    for cell, colour in enumerate(colours):
        x, y = 64 * (cell % 2) + 14, 64 * (cell // 2) + 14
        (draw.ellipse if generator.random() < 0.5 else draw.rectangle)((x, y, x + 36, y + 36), fill=colour)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue(), colours


def sample(index: int, broken: bool = False) -> dict[str, Any]:
    data, colours = scene(index)
    questions = [
        ("colour", "What colour is the shape at the top left?", colours[0]),
        ("count", "How many shapes are red?", str(colours.count("red"))),
        ("presence", "Is there a blue shape?", "yes" if "blue" in colours else "no"),
    ]
    if index == 0:
        questions[0] = ("colour", HOSTILE, colours[0])
    conversations = [
        {
            "source_id": f"{index}-{number}",
            "turns": [{"role": "user", "text": text}],
            "placeholder": "before",
            "answers": [answer],
            "choices": [],
            "category": category,
            "extra": "{}",
        }
        for number, (category, text, answer) in enumerate(questions)
    ]
    medium = {
        "bytes": data[:50] if broken else data, "path": f"scene{index}.png", "format": "png", "sha256": f"{index:064x}",
        "width": 128, "height": 128, "duration_s": None, "fps": None, "num_frames": None,
    }  # fmt: skip
    row = {"sample_id": f"{index:032x}", "dataset": "scenes", "split": "test", "modality": "image"}
    return {**row, "media": [medium], "conversations": conversations}


def job(root: Path, name: str, kind: str, **fields: Any) -> Job:
    """A checked job whose output is claimed, as a driver does first."""
    checked = build_job("test", {"name": name, "kind": kind, "output": str(root / name), **fields})
    manifest.claim_output(checked, manifest.job_run_id(checked))
    return checked


def finish(job: Job, seconds: float, **fields: Any) -> str:
    """Write the manifest as a driver does last, as if the stage had taken `seconds`."""
    return manifest.write_manifest(job, manifest.job_run_id(job), time.time() - seconds, **fields).run_id


def ingest(root: Path) -> None:
    annotations = root / "questions.json"
    annotations.write_text("[]")
    inputs = {"annotations": str(annotations)}
    ingest_job = job(root, "ingest-test", "ingest", inputs=inputs, ingest={"format": "llava_json", "dataset": "s"})
    output = ingest_job.output
    samples = [sample(index, broken=index == 1) for index in range(SCENES)]
    groups = [pa.Table.from_pylist(samples[start : start + 40], schema=schemas.SAMPLES) for start in range(0, SCENES, 40)]
    entry = parquet.write_table(f"{output}/samples/part-00000.parquet", groups[:2], schemas.SAMPLES)
    second = parquet.write_table(f"{output}/samples/part-00001.parquet", groups[2:], schemas.SAMPLES)
    index = world.write_samples_index(output, [entry, second])
    rows = [{"dataset": "s", "source": f"questions.json:{row}", "reason": reason, "detail": HOSTILE} for row, reason in
            enumerate(["missing_media", "missing_media", "corrupt_media"])]  # fmt: skip
    rejects = parquet.write_table(
        f"{output}/rejects/part-00000.parquet", [pa.Table.from_pylist(rows, schema=schemas.REJECTS)], schemas.REJECTS
    )
    read = 3 * SCENES + 3
    figures = {"width": {"count": SCENES, "sum": 128.0 * SCENES, "min": 128.0, "max": 128.0, "mean": 128.0}}
    figures["bytes"] = {"count": SCENES, "sum": 48000.0, "min": 371.0, "max": 455.0, "mean": 400.0}
    rejected = {"missing_media": 2, "corrupt_media": 1}
    finish(
        ingest_job, 6.2, counts={"read": read, "written": read - 3, "samples": SCENES, "rejected": rejected},
        tables={"samples": [entry, second], "index": [index], "rejects": [rejects]},
        statistics={"figures": figures, "kinds": {"png": SCENES}},
    )  # fmt: skip


def training(root: Path, name: str, method: str, floor: float, steps: int = 900) -> None:
    inputs = {"samples": [{"uri": str(root / "ingest-test")}], "features": str(root / "features-test")}
    model: dict[str, Any] = {"inputs": inputs, "model": {"llama": LLAMA, "tower": TOWER}}
    if name != "base":
        model = {"inputs": {**inputs, "checkpoint": str(root / "base")}}
    training_job = job(root, name, "image_sft", compression={"method": method, "tokens": 1}, image_sft=SFT, **model)
    write_training(training_job, floor, 2.6 if name == "base" else 1.1, steps)


def write_training(job: Job, floor: float, drop: float, steps: int = 900, restarts: dict[int, float] | None = None) -> None:
    """Metrics of a made-up run, and its manifest. `restarts`: seconds lost by the first step of each later attempt."""
    generator = np.random.default_rng(len(job.name))
    step = np.arange(1, steps + 1)
    loss = floor + drop * np.exp(-step / 160) + generator.normal(0, 0.06, steps)
    loss[0] += 2
    seconds, wait = generator.normal(0.11, 0.01, steps), generator.uniform(0, 0.01, steps)
    lost = np.array([(restarts or {}).get(int(number), 0.0) for number in step - 1])
    columns: dict[str, Any] = {
        "step": step - 1, "epoch": step // 300, "loss": loss, "kl": [None] * steps, "tokens": generator.integers(400, 700, steps),
        "cut": np.zeros(steps, dtype=int), "sample_ids_sha256": ["0" * 64] * steps,
        "lr": 1e-3 * (1 - step / steps), "grad_norm": generator.lognormal(0, 0.4, steps),
        "seconds": seconds, "wait": wait, "time": 1.8e9 + np.cumsum(seconds + lost), "attempt": np.cumsum(lost > 0),
        "samples_per_s": 2 / seconds, "tokens_read": [620] * steps, "tokens_per_s": 620 / seconds,
        "memory_bytes": np.minimum(step, 40) * (90 << 20) // 40, "voco_norm": 0.8 + step / steps,
    }  # fmt: skip
    if steps >= 300:  # a validation every 100 steps
        columns["val_loss"] = [float(loss[i]) + 0.1 if i % 100 == 99 else None for i in range(steps)]
        columns["val_score"] = [i / steps if i % 100 == 99 else None for i in range(steps)]
    table = pa.table({name: columns.get(name, [None] * steps) for name in schemas.METRICS.names}, schema=schemas.METRICS)
    parquet.write_table(f"{job.output}/metrics.parquet", [table], schemas.METRICS)
    finish(job, 104.0, counts={"steps": steps}, statistics={"final_loss": float(loss[-1])})


def answers(
    name: str, method: str, skill: float, floor: float = 0.3, *, n: int = 1, checkpoint: str = "",
    samples: list[dict[str, Any]] | None = None, benchmark: str = "scenes", skills: dict[str, float] | None = None,
) -> pa.Table:  # fmt: skip
    """Answers in random order. The same samples are easy for every method; `skills` overrides `skill` by category."""
    rows = samples or [sample(index) for index in range(SCENES)]
    generator = np.random.default_rng(sum(map(ord, name)))
    ease = np.random.default_rng(1).normal(0, 0.12, len(rows))
    lines = []
    for index in generator.permutation(len(rows)):
        for number, conversation in enumerate(rows[int(index)]["conversations"]):
            able = (skills or {}).get(conversation["category"], skill)
            right = generator.random() < np.clip(floor + able + ease[index] - 0.08 * number, 0, 1)
            wrong = HOSTILE if index == 0 else "purple"
            prediction = conversation["answers"][0] + "." if right else wrong
            lines.append(
                {
                    "sample_id": rows[int(index)]["sample_id"], "conversation_index": number,
                    "source_id": conversation["source_id"], "benchmark": benchmark, "category": conversation["category"],
                    "method": method, "n": n, "checkpoint": checkpoint or name.removeprefix("eval-"),
                    "prompt": "USER: ... ASSISTANT:", "prediction": prediction,
                    "references": conversation["answers"], "correct": exact_match(prediction, conversation["answers"]),
                    "new_tokens": 2, "cache_hit": number > 0,
                }
            )  # fmt: skip
    return pa.Table.from_pylist(lines, schema=schemas.ANSWERS)


def evaluation(
    root: Path, name: str, checkpoint: str, table: pa.Table, bounds: dict[str, pa.Table], read_as: str = "own"
) -> None:
    inputs: dict[str, Any] = {
        "samples": [{"uri": str(root / "ingest-test")}], "features": str(root / "features-test"),
        "checkpoint": str(root / checkpoint), **{key: str(root / f"eval-{key}") for key in bounds},
    }  # fmt: skip
    evaluate_job = job(root, name, "evaluate", inputs=inputs, evaluate={"benchmark": "scenes", "read_as": read_as})
    write_evaluation(evaluate_job, table, bounds)


def write_evaluation(job: Job, table: pa.Table, bounds: dict[str, pa.Table]) -> list[dict[str, Any]]:
    """Answers, their scores by the real rules, and the manifest of an evaluate job; returns the rows of scores."""
    entry = parquet.write_table(f"{job.output}/answers/part-00000.parquet", [table], schemas.ANSWERS)
    small = table["method"][0].as_py() != "none"
    rows = [
        row
        for n in table["n"].unique().to_pylist()
        for row in score_rows(
            get_metric("gqa"), table.filter(pc.equal(table["n"], n)), bounds.get("upper"), bounds.get("lower"), 200, 0,
            cache_bytes=4096 * n if small else 262144,
            full_cache_bytes=266240, latency_s=0.0021 if small else 0.0034, seconds=9.5, uncached_flops=7e9,
        )
    ]  # fmt: skip
    scores = parquet.write_table(
        f"{job.output}/scores/part-00000.parquet", [pa.Table.from_pylist(rows, schema=schemas.SCORES)], schemas.SCORES
    )
    finish(job, 12.5, tables={"answers": [entry], "scores": [scores]})
    return rows


def features(root: Path) -> None:
    inputs = {"samples": [{"uri": str(root / "ingest-test")}]}
    finish(job(root, "features-test", "features", inputs=inputs, features={"tower": TOWER}), 21.0, counts={"written": SCENES})


def flow(root: Path) -> Path:
    """Every stage of a small image flow under `root`; returns `root`."""
    ingest(root)
    features(root)
    for name, method, floor in (
        ("base", "none", 0.5),
        ("none", "none", 0.3),
        ("voco", "voco", 0.5),
        ("avg-pool", "avg_pool", 0.6),
    ):
        training(root, name, method, floor)
    bounds = {"upper": answers("eval-upper", "none", 0.55), "lower": answers("eval-lower", "none", 0.05)}
    evaluation(root, "eval-upper", "none", bounds["upper"], {})
    evaluation(root, "eval-lower", "none", bounds["lower"], {}, read_as="voco")
    for name, checkpoint, method, skill in (
        ("eval-base", "base", "none", 0.45), ("eval-voco", "voco", "voco", 0.42), ("eval-avg-pool", "avg-pool", "avg_pool", 0.25),
    ):  # fmt: skip
        evaluation(root, name, checkpoint, answers(name, method, skill), bounds)
    storage.write_json(f"{root}/run.json", {"run_id": "demo-00000000", "job": {"flow": {"stages": stages(root)}}})
    return root


def stages(root: Path) -> list[dict[str, str]]:
    names = [path.parent.name for path in sorted(root.glob("*/manifest.json"))]
    return [{"name": name, "output": str(root / name)} for name in names]
