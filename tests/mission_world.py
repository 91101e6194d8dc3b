"""The whole mission, tiny: every kind of job in one flow, on data that the demo's writers drew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import shapes

from voco.demo import captions, clips, scenes

TRAINING: dict[str, Any] = {
    "epochs": 1, "global_batch": 16, "micro_batch": 8, "learning_rate": 0.002, "save_every": 4, "precision": "fp32",
}  # fmt: skip
# Stages whose tables do not name the flow's location, so they are the same wherever it runs and however often it starts.
TABLES = {
    "cc3m": ["samples"], "scenes": ["samples"], "scenes-test": ["samples"], "webvid": ["samples"], "clips": ["samples"],
    "clips-test": ["samples"], "features": ["features"], "frames": ["frame_cache"],
}  # fmt: skip
ANSWERS = ["sft/runs/none-1/answers", "sft/runs/none-1/lower", "sft/runs/voco-2/answers", "answers-video"]


def write_data(folder: Path) -> None:
    scenes.write_scenes(folder, train_scenes=60, test_scenes=12, seed=0)
    captions.write_captions(folder, 40, seed=0)
    clips.write_clips(folder, train_clips=24, test_clips=8, webvid_clips=8, seed=0)


def flow(data: str, output: str, resources: dict[str, Any]) -> dict[str, Any]:
    """The flow as a job file's content; `data` and `output` are paths or s3:// URIs."""

    def stage(name: str, kind: str, inputs: dict[str, Any], **blocks: Any) -> dict[str, Any]:
        return {"name": name, "kind": kind, "inputs": inputs, **blocks}

    def ingest(name: str, form: str, annotations: str, media: str, split: str = "train", **options: Any) -> dict[str, Any]:
        block = {"format": form, "dataset": name.split("-")[0], "split": split, "unit_rows": 20, **options}
        return stage(name, "ingest", {"annotations": f"{data}/{annotations}", "media": f"{data}/{media}"}, ingest=block)

    def samples(*names: str) -> list[dict[str, str]]:
        return [{"uri": f"@{name}"} for name in names]

    images = {"samples": samples("scenes"), "features": "@features"}
    sft = {**TRAINING, "text": {"template": "question_answer"}}
    train = stage(
        "train", "image_sft", {**images, "checkpoint": "@align"}, image_sft=sft, compression={"method": "voco", "tokens": 1}
    )
    ask = stage(
        "ask", "evaluate", {"samples": samples("scenes-test"), "features": "@features", "checkpoint": "@train"},
        evaluate={"benchmark": "scenes", "resamples": 100},
    )  # fmt: skip
    axes = {"compression": [{"method": "none", "tokens": 1}, {"method": "voco", "tokens": 2}]}
    one_worker = {**resources, "workers": 1}
    start = "@sft/runs/voco-2/train"
    texts = ["@cc3m", "@scenes", "@clips"]
    stages = [
        ingest("cc3m", "llava_json", "cc3m/chat.json", "cc3m/images.zip"),
        ingest("scenes", "llava_json", "scenes_train.json", "images"),
        ingest("scenes-test", "llava_json", "scenes_test.json", "images", "test"),
        ingest("webvid", "webvid_csv", "webvid/results_2M_train.csv", "webvid/videos"),
        ingest("clips", "video_chatgpt", "video-chatgpt/train.json", "video-chatgpt/videos", in_process_rows=0),
        ingest("clips-test", "video_chatgpt", "video-chatgpt/test.json", "video-chatgpt/videos", "test"),
        stage(
            "features", "features", {"samples": samples("cc3m", "scenes", "scenes-test")},
            features={"tower": shapes.TOWER, "unit_images": 40},
        ),
        stage(
            "align", "align", {"samples": samples("cc3m"), "features": "@features", "vocabulary": texts},
            model={**shapes.MODEL, "llama": shapes.llama(vocabulary=320)}, align={**TRAINING, "text": {"template": "plain"}},
        ),
        stage("sft", "sweep", {}, sweep={"axes": axes, "train": {**train, "resources": one_worker}, "evaluate": ask}),
        stage(
            "frames", "frame_cache", {"samples": samples("webvid", "clips", "clips-test"), "checkpoint": start},
            frame_cache={"fps": 1.0, "unit_samples": 10},
        ),
        stage(
            "video", "video_sft", {"samples": samples("clips", "webvid"), "frame_cache": "@frames", "checkpoint": start},
            compression={"method": "voco", "tokens": 2}, video_sft={**sft, "epochs": 4},
        ),
        stage(
            "answers-video", "evaluate", {"samples": samples("clips-test"), "frame_cache": "@frames", "checkpoint": "@video"},
            evaluate={"benchmark": "clips", "resamples": 100},
        ),
        stage("report", "report", {"outputs": ["@sft", "@video", "@answers-video"]}, report={}),
    ]  # fmt: skip
    return {"name": "mission", "kind": "flow", "output": output, "resources": resources, "flow": {"stages": stages}}
