"""The job files of `jobs/`: each is right, can be planned, and the paper's say what the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from pipelines import cli
from voco.job import spec
from voco.job.spec import Job
from voco.job.trials import sweep_trials

ROOT = Path(__file__).parents[1]
JOBS = sorted(ROOT.glob("jobs/**/*.yaml"))
IDS = [str(file.relative_to(ROOT / "jobs")) for file in JOBS]


def local_inputs(job: Job) -> list[str]:
    stages = job.flow.stages if job.flow is not None else [job]
    return [uri for stage in stages for uri in stage.uris().values() if not uri.startswith(("@", "s3://"))]


@pytest.mark.parametrize("file", JOBS, ids=IDS)
def test_plan_takes_it(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In an empty directory a job with local inputs (the demo) is refused for the first of them, and for nothing else."""
    monkeypatch.chdir(tmp_path)
    job = spec.load_job(str(file))
    for uri in local_inputs(job):
        if not Path(uri).exists():
            assert cli.main(["plan", str(file)]) == 2
            assert f"{uri} does not exist" in capsys.readouterr().err
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            Path(uri).write_bytes(b"[]")
    assert cli.main(["plan", str(file)]) == 0, capsys.readouterr().err
    stages = job.flow.stages if job.flow is not None else [job]
    told = capsys.readouterr().out
    assert all(stage.name in told for stage in stages)


def paper(name: str) -> Job:
    return spec.load_job(str(ROOT / "jobs/paper" / f"{name}.yaml"))


def test_the_papers_settings() -> None:
    """VoCo-LLaMA's supplementary table 1 and its released script; LLaVA's for the alignment."""
    align, image, video = paper("align").align, paper("image-sft").image_sft, paper("video-sft").video_sft
    assert align is not None
    assert image is not None
    assert video is not None
    assert (align.epochs, align.global_batch, align.learning_rate, align.zero_stage) == (1, 256, 1e-3, 2)
    assert align.text is not None
    assert align.text.template == "plain"
    assert (image.epochs, image.global_batch, image.learning_rate, image.zero_stage) == (2, 128, 2e-5, 3)
    assert (image.warmup_share, image.final_lr_share, image.weight_decay) == (0.03, 0.0, 0.0)
    assert (image.precision, image.max_tokens, image.share_vision) == ("bf16", 2048, False)
    assert (video.epochs, video.global_batch, video.learning_rate) == (1, 128, 2e-5)
    compression = paper("image-sft").compression
    assert compression is not None
    assert (compression.method, compression.tokens) == ("voco", 1)
    for name in ("features", "align", "image-sft", "frame-cache", "video-sft", "sweep"):
        held = paper(name).resources
        assert (held.workers, held.gpus_per_worker, held.accelerator) == (8, 1, "A100"), name


def test_steps_are_those_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(ROOT / "jobs/paper/image-sft.yaml")]) == 0
    assert "ceil(665,298 rows / 128) x 2 epochs = 10,396" in capsys.readouterr().out


def test_the_sweep_is_tables_1_and_2() -> None:
    names = [trial.name for trial in sweep_trials(paper("sweep"))]
    assert names == ["none-1", "avg-pool-1", "q-former-1-6", *(f"voco-{2**power}" for power in range(8))]


def test_the_flow_does_what_the_single_files_do() -> None:
    flow = paper("flow").flow
    assert flow is not None
    stages = {stage.name: stage for stage in flow.stages}
    kinds = {stage.kind for stage in flow.stages} | {part.kind for stage in flow.stages for part in stage.parts.values()}
    assert kinds == set(get_args(spec.Kind)) - {"flow"}
    pairs = {
        "cc3m": "ingest/cc3m", "llava665k": "ingest/llava665k", "webvid": "ingest/webvid", "features": "paper/features",
        "video-chatgpt": "ingest/video-chatgpt", "align": "paper/align", "frame-cache": "paper/frame-cache",
        "video-sft": "paper/video-sft",
    }  # fmt: skip
    for stage, file in pairs.items():
        alone = spec.load_job(str(ROOT / f"jobs/{file}.yaml"))
        assert stages[stage].block == alone.block, stage
        assert (stages[stage].compression, stages[stage].model) == (alone.compression, alone.model), stage
    sweep, trained = stages["sweep"].sweep, paper("sweep").sweep
    assert sweep is not None
    assert trained is not None
    assert sweep.train.image_sft == trained.train.image_sft == paper("image-sft").image_sft
    used = {trial.name for trial in sweep_trials(stages["sweep"])}
    assert stages["frame-cache"].inputs.checkpoint == "@sweep/runs/voco-2/train"
    assert "voco-2" in used


def test_what_is_to_be_filled_in_is_marked() -> None:
    for file in [*(ROOT / "jobs/paper").glob("*.yaml"), *(ROOT / "jobs/ingest").glob("*.yaml")]:
        job = spec.load_job(str(file))
        assert job.output.startswith("s3://YOUR-BUCKET/"), file
        assert local_inputs(job) == [], file
        assert cli.main(["run", str(file)]) == 2, file
