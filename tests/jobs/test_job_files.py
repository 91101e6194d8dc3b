"""The job files of `jobs/`: each can be planned, other files write its inputs, and the paper's flow has the paper's settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import cli
from voco.job.benchmarks import default_metric
from voco.job.config import Ingest
from voco.job.load import load_job, resolve_stage
from voco.job.spec import STAGES, Job
from voco.job.trials import inner_jobs, sweep_trials

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("jobs/**/*.yaml"))
IDS = [str(file.relative_to(ROOT / "jobs")) for file in FILES]
STORAGE = "s3://YOUR-BUCKET/voco/"  # what our jobs write; raw/ and models/ are the user's
FIRST_ROW = {  # of the local annotations in our job files, by format: `plan` reads them as `run` would
    "llava_json": '[{"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada"}]}]',
    "webvid_csv": "videoid,name,page_dir\n1,A boat,012301_012350\n",
    "video_chatgpt": '[{"q": "Who?", "a": "Ada", "video_id": "v_1"}]',
}
TABLE_1 = {"mmbench": "mmbench", "mme": "mme", "pope": "pope", "seed": "seed", "scienceqa": "scienceqa", "vqav2": "vqa"}
VIDEO_SETS = ("msvd-qa", "msrvtt-qa", "activitynet-qa")
# keys that change memory and speed, not the result
HARDWARE = {"micro_batch", "micro_tokens", "zero_stage", "checkpoint_activations", "compile", "offload"}


def local_inputs(job: Job) -> list[str]:
    return [uri for stage in job.stages for uri in stage.uris().values() if not uri.startswith(("@", "s3://"))]


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_plan_accepts_it(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In an empty directory a job with local inputs (the demo) is refused for the first missing one, and for nothing else."""
    monkeypatch.chdir(tmp_path)
    job = load_job(str(file))
    for uri in local_inputs(job):
        if not Path(uri).exists():
            assert cli.main(["plan", str(file)]) == 2
            assert f"{uri} does not exist" in capsys.readouterr().err
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            formats = [
                stage.block.format for stage in job.stages if isinstance(stage.block, Ingest) and uri in stage.uris().values()
            ]
            Path(uri).write_text(FIRST_ROW[formats[0]] if formats else "")
    assert cli.main(["plan", str(file)]) == 0, capsys.readouterr().err
    plan = capsys.readouterr().out
    assert all(stage.name in plan for stage in job.stages)


def resolved_stages(job: Job) -> Iterator[Job]:
    """The job, or each stage of a flow, with every `@stage` replaced by that stage's output."""
    outputs: dict[str, str] = {}
    for stage in job.stages:
        yield resolve_stage(stage, outputs)
        outputs[stage.name] = stage.output


def all_outputs(job: Job) -> set[str]:
    """The output of the job and of every job inside it."""
    return {job.output}.union(*(all_outputs(inner) for inner in inner_jobs(job)))


def test_every_input_is_the_output_of_a_job_file() -> None:
    """Also inside a flow: `@sweep/runs/voco-2/train` is a trial that the sweep has."""
    jobs = {name: load_job(str(file)) for name, file in zip(IDS, FILES, strict=True)}
    outputs = set().union(*map(all_outputs, jobs.values()))
    for name, job in jobs.items():
        for stage, resolved in zip(job.stages, resolved_stages(job), strict=True):
            for key, uri in resolved.uris().items():
                if uri.startswith(STORAGE) or stage.uris()[key].startswith("@"):
                    assert uri in outputs, f"{name}: {stage.name}.{key}: no job file writes {uri}"


def test_no_two_files_write_the_same_output() -> None:
    outputs = [output for file in FILES for output in all_outputs(load_job(str(file)))]
    assert len(outputs) == len(set(outputs))


def stages_of(name: str) -> dict[str, Job]:
    """The stages of a flow by name, and the training job of its sweep."""
    stages = {stage.name: stage for stage in load_job(str(ROOT / "jobs" / f"{name}.yaml")).stages}
    return stages | {part.name: part for stage in stages.values() for part in stage.parts.values() if part.name not in stages}


def test_the_papers_settings() -> None:
    """VoCo-LLaMA's supplementary table 1 and its released script; LLaVA's for the alignment."""
    stages = stages_of("paper/flow")
    align, image, video = (stages[name].block for name in ("align", "image-sft", "video-sft"))
    assert (align.epochs, align.global_batch, align.learning_rate, align.zero_stage) == (1, 256, 1e-3, 2)
    assert (align.warmup_share, align.weight_decay, align.precision, align.max_tokens) == (0.03, 0.0, "bf16", 2048)
    assert align.text.template == "plain"
    assert (image.epochs, image.global_batch, image.learning_rate, image.zero_stage) == (2, 128, 2e-5, 3)
    assert (image.warmup_share, image.final_lr_share, image.weight_decay) == (0.03, 0.0, 0.0)
    assert (image.precision, image.max_tokens, image.share_vision) == ("bf16", 2048, False)
    assert (video.epochs, video.global_batch, video.learning_rate) == (1, 128, 2e-5)
    for name in ("align", "sweep", "image-sft", "frame-cache", "video-sft", "video-qa"):
        resources = stages[name].resources
        assert (resources.workers, resources.gpus_per_worker, resources.accelerator) == (8, 1, "A100"), name


def test_steps_are_those_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(ROOT / "jobs/paper/flow.yaml")]) == 0
    assert "each trial: steps: ceil(665,298 conversations / 128) x 2 epochs = 10,396" in capsys.readouterr().out


def test_the_sweep_is_tables_1_and_2() -> None:
    names = [trial.name for trial in sweep_trials(stages_of("paper/flow")["sweep"])]
    assert names == ["none-1", "avg-pool-1", "q-former-1-6", *(f"voco-{2**power}" for power in range(8))]


@pytest.mark.parametrize("name", ["paper/flow", "gpu/1x24gb", "gpu/1x24gb-lora", "gpu/1xh200", "gpu/8xh100"])
def test_on_gpus_the_frozen_tower_runs_inside_training_and_evaluation(name: str) -> None:
    stages = stages_of(name)
    reading = [stage for stage in stages.values() if "features" in stage.stage.may]
    assert {"align", "image_sft", "evaluate"} <= {stage.kind for stage in reading}
    assert {stage.inputs.features for stage in reading} == {None}
    tower = stages["align"].model.tower
    assert (tower.name, tower.layer) == ("clip", -2)
    if name != "gpu/1x24gb":
        assert (tower.image_size, tower.path) == (336, "openai/clip-vit-large-patch14-336")


def test_the_paper_has_a_stage_of_every_kind_and_ingests_as_the_single_files_do() -> None:
    stages = stages_of("paper/flow")
    assert {stage.kind for stage in stages.values()} == set(STAGES) - {"flow", "features"}
    training = ("cc3m", "llava665k", "webvid", "video-chatgpt")
    files = {"gqa": "gqa-own"} | {name: name for name in (*training, *TABLE_1, *VIDEO_SETS)}
    assert {name for name, stage in stages.items() if stage.kind == "ingest"} == set(files)
    for name, file in files.items():
        single = load_job(str(ROOT / f"jobs/ingest/{file}.yaml"))
        assert stages[name].block == single.block, name
        assert (stages[name].inputs, stages[name].expect) == (single.inputs, single.expect), name
    checkpoints = {stages[name].inputs.checkpoint for name in ("frame-cache", "video-sft")}
    assert checkpoints == {"@sweep/runs/voco-2/train"}


def test_the_paper_evaluates_every_set_of_table_1_and_three_video_sets() -> None:
    """Beside GQA, which the sweep evaluates: by the set's own metric, with one token, and retention between both bounds."""
    stages = stages_of("paper/flow")
    compared = {"voco-1": "voco-1", "avg-pool": "avg-pool-1", "q-former": "q-former-1-6"}
    trials = {trial.name for trial in sweep_trials(stages["sweep"])}
    assert stages["sweep"].block.evaluate.block.benchmark == "gqa"
    for name, metric in TABLE_1.items():
        uncompressed = "@sweep/runs/none-1/train"
        for row, read_as in (("upper", "own"), ("lower", "voco")):
            bound = stages[f"{name}-{row}"]
            assert (bound.inputs.checkpoint, bound.block.read_as, bound.inputs.upper) == (uncompressed, read_as, None)
        for row, trial in compared.items():
            stage = stages[f"{name}-{row}"]
            assert trial in trials
            assert (stage.inputs.checkpoint, stage.block.read_as) == (f"@sweep/runs/{trial}/train", "own")
            assert (stage.inputs.upper, stage.inputs.lower) == (f"@{name}-upper", f"@{name}-lower")
            assert (stage.block.metric or default_metric(stage.block.benchmark)) == metric
        of_set = [stages[f"{name}-{row}"] for row in ("upper", "lower", *compared)]
        assert {stage.inputs.samples[0].uri for stage in of_set} == {f"@{name}"}
    for name, stage_name in zip(VIDEO_SETS, ("video-qa", "video-qa-msrvtt", "video-qa-activitynet"), strict=True):
        stage = stages[stage_name]
        assert (stage.block.benchmark, [table.uri for table in stage.inputs.samples]) == (name, [f"@{name}"])
        assert f"@{name}" in {table.uri for table in stages["frame-cache"].inputs.samples}
    reported = set(stages["report"].inputs.outputs)
    assert {f"@{name}" for name, stage in stages.items() if stage.kind == "evaluate" and name != "gqa"} - {"@train"} <= reported


@pytest.mark.parametrize("name", ["1x24gb", "1x24gb-lora", "1xh200", "8xh100"])
def test_other_gpus_train_with_the_papers_recipe(name: str) -> None:
    """All but the keys of the hardware; the small model has its own language model, tower and template, an adapter its rate."""
    paper, stages = stages_of("paper/flow"), stages_of(f"gpu/{name}")
    compression = stages["image-sft"].compression
    assert compression is not None
    assert (compression.method, compression.tokens) == ("voco", 1)
    template = {"text"} if name == "1x24gb" else set()
    adapter = {"lora", "learning_rate"} if name == "1x24gb-lora" else set()
    for stage in ("align", "image-sft"):
        unlike = HARDWARE | (template | adapter if stage == "image-sft" else set())
        assert stages[stage].block.model_dump(exclude=unlike) == paper[stage].block.model_dump(exclude=unlike), stage
    if not template:
        assert stages["align"].model == paper["align"].model


def test_what_is_to_be_filled_in_is_marked() -> None:
    for file in FILES:
        if file.parent.name == "demo":
            continue
        job = load_job(str(file))
        assert job.output.startswith(STORAGE), file
        assert local_inputs(job) == [], file
        assert cli.main(["run", str(file)]) == 2, file
