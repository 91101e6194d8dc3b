"""The long recipe: the demo's stages with other sizes and more methods, one job file for each seed and data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from voco.demo import evidence
from voco.demo.evidence_flow import BUDGETS, SIZES, VIDEO_STAGES
from voco.job.load import load_job
from voco.job.spec import Job
from voco.job.trials import inner_jobs

ROOT = Path(__file__).parents[2]
ELASTIC = "voco-1-2-4-8-16-0-2"
Files = dict[tuple[str, int], str]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    return {(data, seed): evidence.write_job_file(seed, data) for data in evidence.JOBS for seed in (0, 7)}


def stages_of(file: str) -> dict[str, Job]:
    return {stage.name: stage for stage in load_job(file).stages}


def test_each_seed_is_a_valid_flow_with_the_long_recipe(files: Files) -> None:
    of_demo = [stage["name"] for stage in yaml.safe_load((ROOT / "jobs/demo/flow.yaml").read_text())["flow"]["stages"]]
    for (data, seed), file in files.items():
        stages = stages_of(file)
        expected = of_demo if data == "scenes" else [name for name in of_demo if name not in VIDEO_STAGES]
        assert [name for name in stages if name in expected] == expected
        trials = [job for job in inner_jobs(stages["sft"]) if job.kind == "image_sft"]
        for training in (stages["base"], *trials):
            block = training.block
            assert (block.epochs, block.global_batch, block.learning_rate, training.seed) == (3, 32, 0.001, seed)
            assert block.text.template == "question_answer"
        assert stages["features"].block.tower.image_size == stages["align"].model.tower.image_size == 128
        assert all(".demo" not in uri for stage in stages.values() for uri in [stage.output, *stage.uris().values()])


def test_elastic_training_is_beside_a_model_of_each_n_and_read_in_every_way(files: Files) -> None:
    for file in files.values():
        stages = stages_of(file)
        trained = {job.name: job.compression.sizes for job in inner_jobs(stages["sft"]) if job.kind == "image_sft"}
        assert trained[ELASTIC] == tuple(SIZES)
        assert {f"voco-{n}" for n in SIZES} < set(trained)
        evaluations = {job.name: job for job in inner_jobs(stages["sft"]) if job.kind == "evaluate"}
        assert evaluations[f"answers-{ELASTIC}"].block.tokens == SIZES
        assert evaluations[f"whole-{ELASTIC}"].block.read_as == "none"
        assert stages["answers-voco-1-whole"].block.read_as == "none"
        held_out, scored = stages["answers-val"], stages["answers-auto-2"]
        assert held_out.inputs.checkpoint == scored.inputs.checkpoint
        assert held_out.inputs.sample_uris != scored.inputs.sample_uris
        budgets = [stage.block.budget for name, stage in stages.items() if name.startswith("answers-auto")]
        assert budgets == [float(budget) for budget in BUDGETS]
        assert len(stages["report"].inputs.outputs) >= len(BUDGETS) + 4


def test_photos_are_trained_and_scored_alone_and_in_grids(files: Files) -> None:
    stages = stages_of(files["photos", 0])
    (training, *_), ingests = inner_jobs(stages["sft"]), [stage for stage in stages.values() if stage.kind == "ingest"]
    assert all("photos/" in stage.inputs.annotations for stage in ingests)
    assert training.inputs.sample_uris == ["@scenes", "@photos"]
    assert stages["answers-base"].inputs.sample_uris == ["@scenes-test", "@shapes"]
    assert stages["shapes"].inputs.annotations.endswith("photos/test.json"), "of test photos only"
    assert stages["answers-base"].block.benchmark == "photos"


def test_seeds_share_tables_and_features_and_nothing_else(files: Files) -> None:
    for data in evidence.JOBS:
        first, second = ({stage.name: stage.output for stage in load_job(files[data, seed]).stages} for seed in (0, 7))
        shared = {name for name in first if first[name] == second[name]}
        assert shared == {stage.name for stage in load_job(files[data, 0]).stages if stage.kind in ("ingest", "features")}
