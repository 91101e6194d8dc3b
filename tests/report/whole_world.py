"""The whole flow in small: a sweep with real checkpoints, real clips, their real frame caches, and made-up learning."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import report.report_world as report_world
import video_world
import world

from voco.job.config import Model, Text
from voco.job.spec import Job
from voco.job.trials import sweep_trials
from voco.model import build, weights
from voco.precompute.frame_cache import FrameWorker, list_media_samples
from voco.run import units
from voco.store import parquet, schemas, storage

CLIPS = 60
LLAMA = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocabulary": 300}
TOWER = {"name": "efficientnet_lite0", "image_size": 128}  # 64 vision slots
SFT = {"epochs": 1, "global_batch": 2, "micro_batch": 2, "learning_rate": 1e-3}
SCENES = {"benchmark": "scenes"}
SKILLS = {"none-1": 0.55, "voco-1": 0.36, "voco-4": 0.46, "avg-pool-1": 0.22}
AXIS = [
    {"method": "none", "tokens": 1}, {"method": "voco", "tokens": 1}, {"method": "voco", "tokens": 4},
    {"method": "avg_pool", "tokens": 1},
]  # fmt: skip


def ingested(root: Path, name: str, form: str, made: list[dict[str, Any]]) -> None:
    """A finished ingest output of these rows."""
    annotations = root / f"{name}.json"
    annotations.write_text("[]")
    block = {"format": form, "dataset": name, "split": made[0]["split"]}
    job = report_world.job(root, name, "ingest", inputs={"annotations": str(annotations)}, ingest=block)
    entry = parquet.write_table(
        f"{job.output}/samples/part-00000.parquet", [pa.Table.from_pylist(made, schema=schemas.SAMPLES)], schemas.SAMPLES
    )
    asked = sum(len(row["conversations"]) for row in made)
    key = "width" if made[0]["modality"] == "image" else "duration_s"
    held = [row["media"][0][key] for row in made]
    figures = {key: {"count": len(made), "min": min(held), "mean": sum(held) / len(held), "max": max(held)}}
    report_world.finish(
        job, 3.1, counts={"read": asked, "written": asked, "samples": len(made), "rejected": {}},
        tables={"samples": [entry]}, statistics={"figures": figures, "kinds": {made[0]["media"][0]["format"]: len(made)}},
    )  # fmt: skip


def captions() -> list[dict[str, Any]]:
    made = []
    for index in range(200, 206):
        row = report_world.sample(index)
        talk = world.conversation("describe the image briefly.", "four shapes on a pale ground", False)
        made.append({**row, "dataset": "cc3m", "split": "train", "conversations": [talk]})
    return made


def clips() -> list[dict[str, Any]]:
    """Training clips: the second cannot be decoded, the third's bytes are not in the table."""
    made = video_world.sample_rows(3, first=1000)
    made[1]["media"][0]["bytes"] = made[1]["media"][0]["bytes"][:300]
    made[2]["media"][0]["bytes"] = None
    return made


def checkpoint(output: str, method: str, tokens: int) -> None:
    """A real model's files, untrained."""
    block = Model.model_validate({"llama": LLAMA, "tower": TOWER})
    model = build.create_model(block, method, tokens, Text(template="question_answer"), ["does it get brighter?"], seed=3)
    with tempfile.TemporaryDirectory() as folder:
        weights.save_checkpoint(model, weights.own_state(model), Path(folder) / "model")
        storage.put_directory(Path(folder) / "model", f"{output}/model")


def sweep(root: Path) -> None:
    """Every trial of the demo's axis with its evaluations, and the table of trials."""
    inputs = {"samples": [{"uri": str(root / "ingest-test")}], "features": str(root / "features-test")}
    train = {
        "name": "train", "kind": "image_sft", "inputs": {**inputs, "checkpoint": str(root / "base")},
        "compression": AXIS[1], "image_sft": SFT,
    }  # fmt: skip
    evaluate = {"name": "answers", "kind": "evaluate", "inputs": {**inputs, "checkpoint": "@train"}, "evaluate": SCENES}
    made = report_world.job(root, "sft", "sweep", sweep={"axes": {"compression": AXIS}, "train": train, "evaluate": evaluate})
    bounds: dict[str, pa.Table] = {}
    found: list[dict[str, Any]] = []
    for trial in sorted(sweep_trials(made), key=lambda trial: not trial.is_bound):
        assert trial.train.compression is not None
        begun(trial.train)
        checkpoint(trial.train.output, trial.train.compression.method, trial.train.compression.tokens)
        report_world.trained(trial.train, 1.1 - SKILLS[trial.name], 0.8, steps=600)
        for evaluation in trial.evaluations:
            begun(evaluation)
            low = evaluation.block.read_as == "voco"
            table = report_world.answers(
                evaluation.name, "lower_bound" if low else trial.train.compression.method, 0.05 if low else SKILLS[trial.name],
                n=trial.train.compression.tokens, checkpoint=trial.train.output,
            )  # fmt: skip
            scored = report_world.answered(evaluation, table, {} if trial.is_bound else bounds)
            if trial.is_bound:
                bounds["lower" if low else "upper"] = table
            facts = {"trial": trial.name, "output": evaluation.output, "final_loss": 1.1 - SKILLS[trial.name]}
            found += [{**facts, "train_seconds": 104.0, **row} for row in scored]
    table = pa.Table.from_pylist(found, schema=schemas.TRIALS)
    entry = parquet.write_table(f"{made.output}/trials/part-00000.parquet", [table], schemas.TRIALS)
    report_world.finish(made, 470.0, counts={"trials": len(AXIS)}, tables={"trials": [entry]})


def begun(made: Job) -> None:
    report_world.manifest.claim_output(made, report_world.manifest.job_run_id(made))


def frame_cache(root: Path) -> None:
    """What the pipeline does, in this process: the real worker on the real clips."""
    block = {"fps": 1.0, "unit_samples": 40}
    samples = [str(root / "webvid"), str(root / "clips-test")]
    inputs = {"samples": [{"uri": uri} for uri in samples], "checkpoint": str(root / "sft/runs/voco-1/train")}
    made = report_world.job(root, "frames", "frame_cache", inputs=inputs, frame_cache=block)
    count = list_media_samples(made.output, samples, 40)
    worker = FrameWorker(made.output, str(root / "sft/runs/voco-1/train"), block)
    with parquet.open_parquet(units.work_list_uri(made.output)) as file:
        done = [worker(unit, file.read_row_group(unit)) for unit in range(count)]
    index = pa.Table.from_pylist([line for record in done for line in record["index"]], schema=schemas.FRAME_INDEX)
    entry = parquet.write_table(f"{made.output}/index.parquet", [index], schemas.FRAME_INDEX)
    files = [one for record in done for one in record["tables"]["frame_cache"]]
    frames = sum(record["counts"]["written"] for record in done)
    stored = sum(one["bytes"] for one in files) / frames
    report_world.finish(
        made, 31.0, counts={"read": CLIPS + 4, "written": frames}, tables={"frame_cache": files, "index": [entry]},
        statistics={"bytes_per_frame": done[0]["bytes_per_frame"], "stored_bytes_per_frame": stored},
    )  # fmt: skip


def videos(root: Path, test: list[dict[str, Any]]) -> None:
    """Video SFT and its answers in order, shuffled, and to one frame: only the order question needs order."""
    inputs = {"samples": [{"uri": str(root / "clips")}], "frame_cache": str(root / "frames")}
    start = {**inputs, "checkpoint": str(root / "sft/runs/voco-1/train")}
    report_world.trained(
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
        made = report_world.job(root, name, "evaluate", inputs=inputs, evaluate={"benchmark": "clips", "frames": frames})
        table = report_world.answers(
            name, method, 0.6, samples=test, benchmark="clips", checkpoint=str(root / "video"), skills={"order": order}
        )
        report_world.answered(made, table, {})


def flow(root: Path) -> Path:
    """Every stage of the present demo's flow under `root`; returns `root`."""
    report_world.ingest(root)
    ingested(root, "cc3m", "llava_json", captions())
    ingested(root, "shapes", "llava_json", [report_world.sample(index) for index in range(300, 304)])
    ingested(root, "webvid", "webvid_csv", video_world.sample_rows(4, first=2000))
    ingested(root, "clips", "video_chatgpt", clips())
    test = video_world.sample_rows(CLIPS, evaluation=True)
    ingested(root, "clips-test", "video_chatgpt", test)
    report_world.features(root)
    inputs: dict[str, Any] = {"samples": [{"uri": str(root / "cc3m")}], "features": str(root / "features-test")}
    inputs["vocabulary"] = [str(root / "cc3m"), str(root / "webvid"), str(root / "clips")]
    model = {"llama": LLAMA, "tower": TOWER}
    report_world.trained(report_world.job(root, "align", "align", inputs=inputs, model=model, align=SFT), 2.4, 3.0, steps=120)
    inputs = {"samples": [{"uri": str(root / "ingest-test")}], "features": str(root / "features-test")}
    inputs["checkpoint"] = str(root / "align")
    base = report_world.job(root, "base", "image_sft", inputs=inputs, compression=AXIS[0], image_sft=SFT)
    report_world.trained(base, 0.5, 2.6)
    sweep(root)
    inputs = {**inputs, "checkpoint": str(root / "base")}
    made = report_world.job(root, "answers-base", "evaluate", inputs=inputs, evaluate=SCENES)
    report_world.answered(made, report_world.answers("answers-base", "none", 0.45, checkpoint=str(root / "base")), {})
    frame_cache(root)
    videos(root, test)
    storage.write_json(f"{root}/run.json", {"run_id": "demo-0", "job": {"flow": {"stages": report_world.stages(root)}}})
    return root
