"""The frozen tower inside training and evaluation, on a real local Ray: two workers, with and without stored features."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from safetensors.torch import load_file

import pipelines
from voco.errors import JobFailed, Refused
from voco.job.spec import Job
from voco.store import parquet
from voco.train import checkpoint_files
from voco.train.state_shards import read_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # two workers under ZeRO-3, twice


def without_features(job: Job, **changes: Any) -> Job:
    raw = job.model_dump(exclude_none=True, exclude_unset=True)
    raw["inputs"].pop("features")
    return Job.model_validate(raw | changes)


def evaluation(root: Path, output: Path, checkpoint: Path, **inputs: Any) -> Job:
    return Job.model_validate(
        {
            "name": "ask", "kind": "evaluate", "output": str(output),
            "inputs": {"samples": [{"uri": str(root / "test")}], "checkpoint": str(checkpoint), **inputs},
            "evaluate": {"benchmark": "halves", "max_new_tokens": 4, "resamples": 100},
        }
    )  # fmt: skip


def test_the_same_losses_weights_and_answers_as_from_features(ray_local: str, tmp_path: Path) -> None:
    world.write_samples(str(tmp_path / "train"), world.sample_rows(24))
    world.write_samples(str(tmp_path / "test"), world.sample_rows(6, evaluation=True, first=100, text_every=0))
    pipelines.run(world.features_job([str(tmp_path / "train"), str(tmp_path / "test")], str(tmp_path / "features")))
    stored = world.sft_job(str(tmp_path / "train"), str(tmp_path / "features"), str(tmp_path / "stored"), zero_stage=3)
    raw = stored.model_dump(exclude_none=True, exclude_unset=True)
    raw["inputs"]["val"], raw["image_sft"]["validate"] = str(tmp_path / "test"), {"every": 2, "rows": 5}
    stored = Job.model_validate(raw)
    live = without_features(stored, output=str(tmp_path / "live"))
    metrics, states = {}, {}
    for name, job in (("stored", stored), ("live", live)):
        pipelines.run(job)
        metrics[name] = parquet.read_table(str(tmp_path / name / "metrics.parquet"))
        states[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    assert metrics["live"]["sample_ids_sha256"] == metrics["stored"]["sample_ids_sha256"]
    assert metrics["live"]["loss"].to_pylist() == pytest.approx(metrics["stored"]["loss"].to_pylist(), rel=1e-5)
    validated = [[loss for loss in metrics[name]["val_loss"].to_pylist() if loss is not None] for name in ("live", "stored")]
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)
    assert len(validated[0]) == 2
    assert metrics["live"]["loss"][0].as_py() > metrics["live"]["loss"][-1].as_py()
    assert states["live"].keys() == states["stored"].keys()
    assert any(key.startswith("tower.") for key in states["live"]), "exported as before, from the starting model"
    for key, weight in states["stored"].items():
        assert torch.allclose(states["live"][key], weight, rtol=1e-3, atol=1e-5), key

    # a checkpoint directory of a run has no weights of the tower
    checkpoint = checkpoint_files.newest(str(tmp_path / "live" / "checkpoints"))
    names = {fragment.name for uri in checkpoint.files for fragment in read_head(uri).fragments}
    assert any(name.startswith("projector.") for name in names)
    assert not [name for name in names if "tower" in name]

    answers = {}
    for name, inputs in (("stored", {"features": str(tmp_path / "features")}), ("live", {})):
        pipelines.run(evaluation(tmp_path, tmp_path / f"ask-{name}", tmp_path / "live", **inputs))
        rows = parquet.read_table(str(tmp_path / f"ask-{name}" / "answers" / "part-00000.parquet")).to_pylist()
        answers[name] = [(row["sample_id"], row["conversation_index"], row["prediction"], row["correct"]) for row in rows]
    assert answers["live"] == answers["stored"]

    # an image that is no picture ends the run on every worker at once, without a restart, and is named
    rows = world.sample_rows(24)
    bad = [row for row in rows if row["media"]][5]
    bad["media"] = [{**copy.deepcopy(bad["media"][0]), "bytes": b"no image"}]
    world.write_samples(str(tmp_path / "broken"), rows)
    broken = without_features(stored, output=str(tmp_path / "out"))
    inputs = broken.inputs.model_validate({"samples": [{"uri": str(tmp_path / "broken")}], "val": broken.inputs.val})
    with pytest.raises(JobFailed, match=f"^sft: sample {bad['sample_id']}: image .* cannot be decoded.*validate: full"):
        pipelines.run(broken.model_copy(update={"inputs": inputs}))

    # videos have no live way
    for row in rows:
        row["modality"] = "video" if row["media"] else "text"
    world.write_samples(str(tmp_path / "videos"), rows)
    inputs = broken.inputs.model_validate({"samples": [{"uri": str(tmp_path / "videos")}]})
    with pytest.raises(Refused, match=r"inputs\.samples: expected images and text, got videos; make a frame_cache .* video_sft"):
        pipelines.run(broken.model_copy(update={"inputs": inputs, "output": str(tmp_path / "none")}))
