"""A recipe in a folder that is not the demo's: its data, its own cluster with a token, and a flow that is sent and followed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from voco.demo import cluster
from voco.demo.flow_run import run_flow
from voco.demo.recipe import DEMO
from voco.job.load import load_job
from voco.run import manifest

SCENES = 20


@pytest.mark.slow
def test_a_recipe_runs_on_the_cluster_of_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)  # without a .demo
    folder = tmp_path / ".elsewhere"
    sizes = {"train_scenes": SCENES, "test_scenes": 5, "val_scenes": 4, "captions": 8, "train_clips": 2, "test_clips": 2}
    recipe = replace(DEMO, folder=folder, webvid_clips=2, **sizes)
    stages = [
        {
            "name": name, "kind": "ingest",
            "inputs": {"annotations": f"{folder}/data/{source}.json", "media": f"{folder}/data/images"},
            "ingest": {"format": "llava_json", "dataset": name, "split": split},
        }
        for name, source, split in (("train", "scenes_train", "train"), ("held-out", "scenes_val", "test"))
    ]  # fmt: skip
    flow = {"name": "small", "kind": "flow", "output": str(folder / "run"), "flow": {"stages": stages}}
    file = tmp_path / "flow.yaml"
    file.write_text(yaml.safe_dump(flow))
    job = load_job(str(file))
    assert run_flow(job, str(file), recipe, {}) == 0
    held_out = manifest.read_manifest(str(folder / "run" / "held-out"))
    assert held_out is not None
    assert held_out.counts["written"] == 4 * 8
    assert not (folder / "cluster.json").exists(), "its cluster ended with the flow"
    assert run_flow(job, str(file), recipe, {}) == 0, "done already"
    assert not (folder / "cluster.json").exists(), "and no cluster was started for it"
    assert not cluster.FOLDER.exists()
