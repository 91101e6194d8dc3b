"""The long recipe: the demo's stages with other sizes, one job file for each seed that shares tables and features."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from voco.demo import evidence
from voco.job.load import load_job
from voco.job.trials import inner_jobs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    return [evidence.write_job_file(seed) for seed in (0, 7)]


def test_each_seed_is_a_valid_flow_with_the_long_recipe(files: list[str]) -> None:
    for seed, file in zip((0, 7), files, strict=True):
        stages = {stage.name: stage for stage in load_job(file).stages}
        assert list(stages) == [
            stage["name"] for stage in yaml.safe_load((ROOT / "jobs/demo/flow.yaml").read_text())["flow"]["stages"]
        ]
        trials = [job for job in inner_jobs(stages["sft"]) if job.kind == "image_sft"]
        for training in (stages["base"], *trials):
            block = training.block
            assert (block.epochs, block.global_batch, block.learning_rate, training.seed) == (3, 32, 0.001, seed)
            assert block.text.template == "question_answer"
        assert stages["features"].block.tower.image_size == stages["align"].model.tower.image_size == 128
        assert all(".demo" not in uri for stage in stages.values() for uri in [stage.output, *stage.uris().values()])


def test_seeds_share_tables_and_features_and_nothing_else(files: list[str]) -> None:
    first, second = ({stage.name: stage.output for stage in load_job(file).stages} for file in files)
    shared = {name for name in first if first[name] == second[name]}
    assert shared == {stage.name for stage in load_job(files[0]).stages if stage.kind in ("ingest", "features")}
