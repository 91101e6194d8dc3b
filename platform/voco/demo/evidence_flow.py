"""The job files of `make evidence`: the demo's stages with the long recipe, more methods, and real photos beside the scenes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from voco.demo.recipe import DEMO, EVIDENCE
from voco.job.trials import trial_name, with_values

SIZES = [1, 2, 4, 8, 16]
ELASTIC = {"method": "voco", "tokens": SIZES, "uncompressed_share": 0.2}
COMPRESSIONS: list[dict[str, Any]] = [
    {"method": "none", "tokens": 1},
    *({"method": "voco", "tokens": n} for n in SIZES),
    ELASTIC,
    {"method": "avg_pool", "tokens": 1},
    {"method": "avg_pool", "tokens": 4},
    {"method": "q_former", "tokens": 1},
]
BUDGETS = (1.5, 2, 4, 8)  # <voco> tokens that adaptive N reads on average
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
        "sweep.axes": {"compression": COMPRESSIONS},
        "sweep.train.inputs.samples": [{"uri": "@scenes"}],
        **{f"sweep.train.image_sft.{key}": value for key, value in TRAINING.items()},
    },
    "video": {**{f"video_sft.{key}": value for key, value in TRAINING.items()}, "video_sft.epochs": 16},
}
VIDEO_STAGES = ("webvid", "clips", "clips-test", "frames", "video", "answers-video", "answers-shuffled", "answers-one-frame")
# What differs in the flow of photos: the files of each ingest below the data's folder, and the data set's name
PHOTO_FILES = {
    "cc3m": ("photos/chat.json", "photos/images", "photo-captions"),
    "shapes": ("photos/test.json", "photos/images", "photos"),
    "scenes": ("photos/scenes_train.json", "photos/images", "photo-scenes"),
    "scenes-test": ("photos/scenes_test.json", "photos/images", "photo-scenes"),
    "scenes-val": ("photos/scenes_val.json", "photos/images", "photo-scenes"),
    "photos": ("photos/train.json", "photos/images", "photos"),
}
# questions about single photos are trained and asked beside those about grids
PHOTO_TEXTS = {
    '{"uri": "@scenes"}': '{"uri": "@scenes"}, {"uri": "@photos"}',
    '{"uri": "@scenes-test"}': '{"uri": "@scenes-test"}, {"uri": "@shapes"}',
    '"benchmark": "scenes"': '"benchmark": "photos"',
    **{f', "@{name}"': "" for name in VIDEO_STAGES},
}
Stage = dict[str, Any]


def seed_output(seed: int, data: str = "scenes") -> str:
    return str(EVIDENCE.folder / (f"seed-{seed}" if data == "scenes" else f"{data}-seed-{seed}"))


def scenes_job(demo: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The content of one seed's job file for drawn scenes and clips, from that of the demo's flow."""
    return _job(demo, _with_adaptive(demo["flow"]["stages"]), seed, "scenes")


def photos_job(demo: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The same stages for photos, without videos."""
    stages = []
    for stage in _with_adaptive(demo["flow"]["stages"]):
        if stage["name"] == "scenes":
            stages.append(_ingest_photos({**stage, "name": "photos"}))
        if stage["name"] not in VIDEO_STAGES:
            stages.append(_ingest_photos(stage) if stage["name"] in PHOTO_FILES else stage)
    job = _job(demo, stages, seed, "photos")
    text = json.dumps(job)
    for before, after in PHOTO_TEXTS.items():
        text = text.replace(before, after)
    changed: dict[str, Any] = json.loads(text)
    return changed


def _ingest_photos(stage: Stage) -> Stage:
    annotations, media, dataset = PHOTO_FILES[stage["name"]]
    inputs = {"annotations": str(DEMO.data / annotations), "media": str(DEMO.data / media)}
    return {**stage, "inputs": inputs, "ingest": {**stage["ingest"], "dataset": dataset}}


def _with_adaptive(stages: Sequence[Stage]) -> list[Stage]:
    """The demo's stages, with those of adaptive N after the sweep and their outputs in the report."""
    named = {stage["name"]: stage for stage in stages}
    test = named["scenes-test"]
    held_out = with_values(test, {"name": "scenes-val", "inputs.annotations": str(DEMO.data / "scenes_val.json")})
    elastic = f"@sft/runs/{trial_name({'compression': ELASTIC})}/train"
    answers = named["answers-base"]
    block = answers["evaluate"]
    adaptive: list[Stage] = [
        {
            "name": "answers-val",
            "kind": "evaluate",
            "inputs": {"samples": [{"uri": "@scenes-val"}], "features": "@features", "checkpoint": elastic},
            "evaluate": {**block, "benchmark": "held-out", "tokens": SIZES},
        },
        *(
            {
                "name": f"answers-auto-{budget}".replace(".", "-"),
                "kind": "evaluate",
                "inputs": {**answers["inputs"], "checkpoint": elastic, "calibration": "@answers-val"},
                "evaluate": {**block, "tokens": "auto", "budget": float(budget)},
            }
            for budget in BUDGETS
        ),
        {
            "name": "answers-voco-1-whole",  # what a model of one N has lost
            "kind": "evaluate",
            "inputs": {**answers["inputs"], "checkpoint": "@sft/runs/voco-1/train"},
            "evaluate": {**block, "read_as": "none"},
        },
    ]
    changed: list[Stage] = []
    for stage in stages:
        if stage["name"] == "features":
            stage = with_values(stage, {"inputs.samples": [*stage["inputs"]["samples"], {"uri": "@scenes-val"}]})
        if stage["name"] == "report":
            outputs = [f"@{added['name']}" for added in adaptive if added["name"] != "answers-val"]
            stage = with_values(stage, {"inputs.outputs": [*stage["inputs"]["outputs"], *outputs]})
        changed += [stage, *([held_out] if stage is test else []), *(adaptive if stage["name"] == "sft" else [])]
    return changed


def _job(demo: Mapping[str, Any], stages: Sequence[Stage], seed: int, data: str) -> dict[str, Any]:
    """The stages with the long recipe, one seed, and the evidence's folders."""
    changed = []
    for stage in stages:
        stage = with_values(stage, CHANGES.get(stage["name"], {}))
        if stage["kind"] in SHARED_KINDS:
            stage["output"] = str(EVIDENCE.folder / "shared" / (stage["name"] if data == "scenes" else f"{data}-{stage['name']}"))
        else:
            stage["seed"] = seed
        if stage["kind"] == "sweep":
            stage["sweep"]["train"]["seed"] = seed
        if stage["kind"] == "report":
            stage["report"] = {"title": f"VoCo: {data}, seed {seed}"}
        changed.append(stage)
    name = f"evidence-{seed}" if data == "scenes" else f"evidence-{data}-{seed}"
    content = {**demo, "name": name, "output": seed_output(seed, data), "flow": {"stages": changed}}
    moved: dict[str, Any] = json.loads(json.dumps(content).replace(f"{DEMO.data}/", f"{EVIDENCE.data}/"))
    return moved
