"""A tiny flow with every kind of stage, as a job file in its own working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import shapes
import yaml

from voco.demo import scenes

SFT: dict[str, Any] = {
    "epochs": 2,
    "global_batch": 16,
    "micro_batch": 8,
    "learning_rate": 0.002,
    "save_every": 4,
    "precision": "fp32",
}


def write(folder: Path) -> Path:
    """Data from real images and the flow's job file; returns the file."""
    scenes.write_scenes(folder / "data", train_scenes=120, test_scenes=40, seed=0)
    base = {
        "model": {**shapes.MODEL, "llama": shapes.llama(vocabulary=320)},
        "image_sft": {**SFT, "epochs": 12, "text": {"template": "question_answer"}},
    }
    stages = [
        ingest("scenes", "scenes_train.json", "train"),
        ingest("scenes-test", "scenes_test.json", "test"),
        stage(
            "features", "features", {"samples": [{"uri": "@scenes"}, {"uri": "@scenes-test"}]}, features={"tower": shapes.TOWER}
        ),
        {**sft("base", "none"), **base},
        sft("voco1", "voco", "@base"),
        stage("frames", "frame_cache", {"samples": [{"uri": "@scenes-test"}], "checkpoint": "@voco1"}, frame_cache={"fps": 1.0}),
        answers("answers-upper", "@base"),
        answers("answers-lower", "@base", read_as="voco"),
        answers("answers-voco1", "@voco1", upper="@answers-upper", lower="@answers-lower"),
        stage("report", "report", {"outputs": ["@answers-voco1", "@answers-upper", "@answers-lower"]}, report={}),
    ]
    flow = {"name": "tiny", "kind": "flow", "output": "out", "resources": {"workers": 2}, "flow": {"stages": stages}}
    file = folder / "flow.yaml"
    file.write_text(yaml.safe_dump(flow))
    return file


def stage(name: str, kind: str, inputs: dict[str, Any], **blocks: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "inputs": inputs, **blocks}


def ingest(name: str, annotations: str, split: str) -> dict[str, Any]:
    block = {"format": "llava_json", "dataset": "scenes", "split": split}
    return stage(name, "ingest", {"annotations": f"data/{annotations}", "media": "data/images"}, ingest=block)


def sft(name: str, method: str, checkpoint: str | None = None) -> dict[str, Any]:
    inputs: dict[str, Any] = {"samples": [{"uri": "@scenes"}], "features": "@features"}
    if checkpoint is not None:
        inputs["checkpoint"] = checkpoint
    return stage(name, "image_sft", inputs, compression={"method": method, "tokens": 1}, image_sft=SFT)


def answers(name: str, checkpoint: str, read_as: str = "own", **bounds: str) -> dict[str, Any]:
    inputs = {"samples": [{"uri": "@scenes-test"}], "features": "@features", "checkpoint": checkpoint, **bounds}
    return stage(name, "evaluate", inputs, evaluate={"benchmark": "scenes", "read_as": read_as, "resamples": 200})
