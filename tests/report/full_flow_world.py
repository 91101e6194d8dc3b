"""The complete flow, small: a sweep with real checkpoints, real clips and frame caches, and made-up learning curves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import report.report_world as report_world
import shapes
import video_world
import world

from voco.job.config import Model, Text
from voco.job.spec import Job
from voco.job.trials import sweep_trials
from voco.model import build, weights
from voco.precompute.frame_cache import FrameWorker, list_media_samples, write_index
from voco.run import units
from voco.store import parquet, schemas, storage

CLIPS = 60
MODEL = {"llama": shapes.LLAMA, "tower": shapes.tower(image_size=128)}  # 64 vision slots
SFT = {"epochs": 1, "global_batch": 2, "micro_batch": 2, "learning_rate": 1e-3}
SCENES = {"benchmark": "scenes"}
SKILLS = {"none-1": 0.55, "voco-1": 0.36, "voco-4": 0.46, "avg-pool-1": 0.22}
AXIS = [
    {"method": "none", "tokens": 1}, {"method": "voco", "tokens": 1}, {"method": "voco", "tokens": 4},
    {"method": "avg_pool", "tokens": 1},
]  # fmt: skip


def write_ingest(root: Path, name: str, source_format: str, rows: list[dict[str, Any]]) -> None:
    """A finished ingest output of these rows."""
    annotations = root / f"{name}.json"
    annotations.write_text("[]")
    block = {"format": source_format, "dataset": name, "split": rows[0]["split"]}
    job = report_world.job(root, name, "ingest", inputs={"annotations": str(annotations)}, ingest=block)
    entry = parquet.write_table(
        f"{job.output}/samples/part-00000.parquet", [pa.Table.from_pylist(rows, schema=schemas.SAMPLES)], schemas.SAMPLES
    )
    read = sum(len(row["conversations"]) for row in rows)
    key = "width" if rows[0]["modality"] == "image" else "duration_s"
    values = [row["media"][0][key] for row in rows]
    figures = {key: {"count": len(rows), "min": min(values), "mean": sum(values) / len(values), "max": max(values)}}
    tables = {"samples": [entry], "index": [world.write_samples_index(job.output, [entry])]}
    report_world.finish(
        job, 3.1, counts={"read": read, "written": read, "samples": len(rows), "rejected": {}},
        tables=tables, statistics={"figures": figures, "kinds": {rows[0]["media"][0]["format"]: len(rows)}},
    )  # fmt: skip


def captions() -> list[dict[str, Any]]:
    rows = []
    for index in range(200, 206):
        row = report_world.sample(index)
        conversation = world.conversation("describe the image briefly.", "four shapes on a pale ground", False)
        rows.append({**row, "dataset": "cc3m", "split": "train", "conversations": [conversation]})
    return rows


def clips() -> list[dict[str, Any]]:
    """Training clips: the second cannot be decoded, and the bytes of the third are not in the table."""
    rows = video_world.sample_rows(3, first=1000)
    rows[1]["media"][0]["bytes"] = rows[1]["media"][0]["bytes"][:300]
    rows[2]["media"][0]["bytes"] = None
    return rows


def write_checkpoint(output: str, method: str, tokens: int) -> None:
    """The files of a real, untrained model."""
    block = Model.model_validate(MODEL)
    model = build.create_model(block, method, tokens, Text(template="question_answer"), ["does it get brighter?"], seed=3)
    with tempfile.TemporaryDirectory() as folder:
        weights.save_checkpoint(model, weights.own_state(model), Path(folder) / "model")
        storage.put_directory(Path(folder) / "model", f"{output}/model")


def sweep(root: Path) -> None:
    """Every trial of AXIS with its evaluations, and the table of trials."""
    inputs = {"samples": [{"uri": str(root / "ingest-test")}], "features": str(root / "features-test")}
    train = {
        "name": "train", "kind": "image_sft", "inputs": {**inputs, "checkpoint": str(root / "base")},
        "compression": AXIS[1], "image_sft": SFT,
    }  # fmt: skip
    evaluate = {"name": "answers", "kind": "evaluate", "inputs": {**inputs, "checkpoint": "@train"}, "evaluate": SCENES}
    job = report_world.job(root, "sft", "sweep", sweep={"axes": {"compression": AXIS}, "train": train, "evaluate": evaluate})
    bounds: dict[str, pa.Table] = {}
    rows: list[dict[str, Any]] = []
    for trial in sorted(sweep_trials(job), key=lambda trial: not trial.is_bound):
        assert trial.train.compression is not None
        claim(trial.train)
        write_checkpoint(trial.train.output, trial.train.compression.method, trial.train.compression.tokens)
        restarts = {300: 40.0} if trial.name == "voco-4" else None
        report_world.write_training(trial.train, 1.1 - SKILLS[trial.name], 0.8, steps=600, restarts=restarts)
        for evaluation in trial.evaluations:
            claim(evaluation)
            low = evaluation.block.read_as == "voco"
            table = report_world.answers(
                evaluation.name, "lower_bound" if low else trial.train.compression.method, 0.05 if low else SKILLS[trial.name],
                n=trial.train.compression.tokens, checkpoint=trial.train.output,
            )  # fmt: skip
            scores = report_world.write_evaluation(evaluation, table, {} if trial.is_bound else bounds)
            if trial.is_bound:
                bounds["lower" if low else "upper"] = table
            facts = {"trial": trial.name, "output": evaluation.output, "final_loss": 1.1 - SKILLS[trial.name]}
            rows += [{**facts, "train_seconds": 104.0, **row} for row in scores]
    table = pa.Table.from_pylist(rows, schema=schemas.TRIALS)
    entry = parquet.write_table(f"{job.output}/trials/part-00000.parquet", [table], schemas.TRIALS)
    report_world.finish(job, 470.0, counts={"trials": len(AXIS)}, tables={"trials": [entry]})


def claim(job: Job) -> None:
    report_world.manifest.claim_output(job, report_world.manifest.job_run_id(job))


def frame_cache(root: Path) -> None:
    """The pipeline's work in this process: the real worker on the real clips."""
    block = {"fps": 1.0, "unit_samples": 40}
    samples = [str(root / "webvid"), str(root / "clips-test")]
    inputs = {"samples": [{"uri": uri} for uri in samples], "checkpoint": str(root / "sft/runs/voco-1/train")}
    job = report_world.job(root, "frames", "frame_cache", inputs=inputs, frame_cache=block)
    count = list_media_samples(job.output, samples, 40)
    worker = FrameWorker(job.output, str(root / "sft/runs/voco-1/train"), block)
    listed = units.WorkList(job.output)
    records = [worker(unit, listed.read(unit)) for unit in range(count)]
    entry = write_index(job.output, records)
    files = [file for record in records for file in record["tables"]["frame_cache"]]
    frames = sum(record["counts"]["written"] for record in records)
    stored = sum(file["bytes"] for file in files) / frames
    report_world.finish(
        job, 31.0, counts={"read": CLIPS + 4, "written": frames}, tables={"frame_cache": files, "index": [entry]},
        statistics={"bytes_per_frame": records[0]["bytes_per_frame"], "stored_bytes_per_frame": stored},
    )  # fmt: skip


def videos(root: Path, test: list[dict[str, Any]]) -> None:
    """Video SFT, and its answers to frames in order, shuffled frames and one frame: only the order question needs order."""
    inputs = {"samples": [{"uri": str(root / "clips")}], "frame_cache": str(root / "frames")}
    start = {**inputs, "checkpoint": str(root / "sft/runs/voco-1/train")}
    report_world.write_training(
        report_world.job(root, "video", "video_sft", inputs=start, compression=AXIS[1], video_sft=SFT), 0.25, 3.9, steps=300
    )
    for frames, name, method, order in (
        ("all", "answers-video", "voco", 0.55),
        ("shuffled", "answers-shuffled", "shuffled_frames", 0.2),
        ("one", "answers-one-frame", "one_frame", 0.15),
    ):
        inputs = {
            "samples": [{"uri": str(root / "clips-test")}], "frame_cache": str(root / "frames"),
            "checkpoint": str(root / "video"),
        }  # fmt: skip
        job = report_world.job(root, name, "evaluate", inputs=inputs, evaluate={"benchmark": "clips", "frames": frames})
        table = report_world.answers(
            name, method, 0.6, samples=test, benchmark="clips", checkpoint=str(root / "video"), skills={"order": order}
        )
        report_world.write_evaluation(job, table, {})


def flow(root: Path) -> Path:
    """The stages of the demo's flow under `root`; returns `root`."""
    report_world.ingest(root)
    write_ingest(root, "cc3m", "llava_json", captions())
    write_ingest(root, "shapes", "llava_json", [report_world.sample(index) for index in range(300, 304)])
    write_ingest(root, "webvid", "webvid_csv", video_world.sample_rows(4, first=2000))
    write_ingest(root, "clips", "video_chatgpt", clips())
    test = video_world.sample_rows(CLIPS, evaluation=True)
    write_ingest(root, "clips-test", "video_chatgpt", test)
    report_world.features(root)
    inputs: dict[str, Any] = {"samples": [{"uri": str(root / "cc3m")}], "features": str(root / "features-test")}
    inputs["vocabulary"] = [str(root / "cc3m"), str(root / "webvid"), str(root / "clips")]
    report_world.write_training(
        report_world.job(root, "align", "align", inputs=inputs, model=MODEL, align=SFT), 2.4, 3.0, steps=120
    )
    inputs = {"samples": [{"uri": str(root / "ingest-test")}], "features": str(root / "features-test")}
    inputs["checkpoint"] = str(root / "align")
    base = report_world.job(root, "base", "image_sft", inputs=inputs, compression=AXIS[0], image_sft=SFT)
    report_world.write_training(base, 0.5, 2.6, restarts={240: 95.0, 600: 31.5})
    sweep(root)
    inputs = {**inputs, "checkpoint": str(root / "base")}
    job = report_world.job(root, "answers-base", "evaluate", inputs=inputs, evaluate=SCENES)
    table = report_world.answers("answers-base", "none", 0.45, checkpoint=str(root / "base"))
    report_world.write_evaluation(job, table, {})
    frame_cache(root)
    videos(root, test)
    storage.write_json(f"{root}/run.json", {"run_id": "demo-0", "job": {"flow": {"stages": report_world.stages(root)}}})
    return root
