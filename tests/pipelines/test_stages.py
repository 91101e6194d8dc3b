"""All stages of the mission through `pipelines.run` on a real local Ray: align, sweep, frame caches, video SFT, answers.

Tiny, but every part is real: encoded clips, Ray Data pools, Ray Train workers with DeepSpeed, Ray Tune trials.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import shapes
import torch
import video_world
import world
from safetensors.torch import load_file

import pipelines
from voco.errors import JobFailed, Refused
from voco.job.spec import Job
from voco.model import weights
from voco.run import manifest
from voco.store import parquet, storage

pytestmark = pytest.mark.ray
SFT = {"epochs": 1, "global_batch": 8, "micro_batch": 4, "learning_rate": 0.003, "precision": "fp32", "zero_stage": 2}
LLAMA = shapes.llama(vocabulary=320)
POOLED = (("avg-pool-1", "avg_pool"), ("q-former-2", "q_former"))


def job(kind: str, output: Path, inputs: dict[str, Any], **blocks: Any) -> Job:
    raw = {"name": kind.replace("_", "-"), "kind": kind, "output": str(output), "resources": {"workers": 2}, "inputs": inputs}
    return Job.model_validate({**raw, **blocks})


@pytest.fixture(scope="module")
def root(ray_local: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples (images, videos, each for training and for evaluation) and features of the images."""
    root = tmp_path_factory.mktemp("stages")
    world.write_samples(str(root / "images"), world.sample_rows(40))
    world.write_samples(str(root / "images-test"), world.sample_rows(10, evaluation=True, first=100, text_every=0))
    world.write_samples(str(root / "videos"), video_world.sample_rows(24))
    world.write_samples(str(root / "videos-test"), video_world.sample_rows(8, evaluation=True, first=50))
    pipelines.run(world.features_job([str(root / "images"), str(root / "images-test")], str(root / "features")))
    return root


def samples(root: Path, *names: str) -> dict[str, Any]:
    return {"samples": [{"uri": str(root / name)} for name in names]}


@pytest.fixture(scope="module")
def aligned(root: Path) -> Path:
    inputs = {
        **samples(root, "images"),
        "features": str(root / "features"),
        "vocabulary": [str(root / n) for n in ("images", "videos")],
    }
    block = {**SFT, "text": {"template": "plain"}, "precision": "bf16"}
    pipelines.run(job("align", root / "align", inputs, model={"llama": LLAMA, "tower": shapes.TOWER}, align=block))
    return root / "align"


@pytest.fixture(scope="module")
def sweep_output(root: Path, aligned: Path) -> Path:
    pipelines.run(sweep(root, root / "sweep"))
    return root / "sweep"


def sweep(root: Path, output: Path) -> Job:
    images = {**samples(root, "images"), "features": str(root / "features"), "checkpoint": str(root / "align")}
    tests = {**samples(root, "images-test"), "features": str(root / "features"), "checkpoint": "@train"}
    train = {
        "name": "sft", "kind": "image_sft", "inputs": images, "compression": {"method": "voco", "tokens": 1},
        "image_sft": {**SFT, "text": {"template": "question_answer"}}, "resources": {"workers": 1},
    }  # fmt: skip
    ask = {"name": "ask", "kind": "evaluate", "inputs": tests, "evaluate": {"benchmark": "halves", "resamples": 100}}
    axes = {
        "compression": [
            {"method": "none", "tokens": 1},
            {"method": "voco", "tokens": 2},
            {"method": "avg_pool", "tokens": 1},
            {"method": "q_former", "tokens": 2},
        ]
    }
    return job("sweep", output, {}, sweep={"axes": axes, "train": train, "evaluate": ask, "concurrent": 2})


@pytest.fixture(scope="module")
def frame_caches(root: Path, sweep_output: Path) -> Path:
    inputs = {**samples(root, "videos", "videos-test", "images"), "checkpoint": str(sweep_output / "runs/voco-2/train")}
    pipelines.run(job("frame_cache", root / "frames", inputs, frame_cache={"fps": 1.0, "unit_samples": 20}))
    return root / "frames"


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["zero-2", "zero-3"])
def video_model(request: Any, root: Path, frame_caches: Path) -> Path:
    return train_video(root, frame_caches, request.param)


def train_video(root: Path, frame_caches: Path, zero_stage: int) -> Path:
    """Once a stage: a second run finds it done."""
    inputs = {
        **samples(root, "videos", "images"),
        "frame_cache": str(frame_caches),
        "checkpoint": str(root / "sweep/runs/voco-2/train"),
    }
    output = root / f"video-{zero_stage}"
    inputs["val"] = str(root / "videos-test")
    validate = {"every": 1000, "rows": 6, "metric": "gqa", "answers": zero_stage < 3}  # after the last step
    block = {**SFT, "epochs": 3, "zero_stage": zero_stage, "validate": validate}
    pipelines.run(job("video_sft", output, inputs, compression={"method": "voco", "tokens": 2}, video_sft=block))
    return output


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model" / "model.safetensors")


def test_align_moves_the_projector_and_nothing_else(aligned: Path) -> None:
    """In bf16, to which DeepSpeed rounds the frozen weights too while it trains."""
    before, after = state(aligned / "initial"), state(aligned)
    moved = {name for name in before if before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name])}
    assert moved
    assert {name.split(".")[0] for name in moved} == {"projector"}
    assert {after[name].dtype for name in moved} == {torch.bfloat16}
    assert any((before[name] - after[name].float()).abs().max() > 1e-3 for name in moved), "more than rounding"
    assert weights.read_config(str(aligned))["language_model"]["dtype"] == "float32"
    layout = weights.read_config(str(aligned))["layout"]
    assert (layout["method"], layout["tokens"], layout["template"]) == ("none", 0, "plain")


def untaught(root: Path, name: str, **sample: Any) -> Job:
    """A job from the aligned checkpoint on one table of samples."""
    inputs = {"samples": [sample], "features": str(root / "features"), "checkpoint": str(root / "align")}
    return job("image_sft", root / name, inputs, compression={"method": "voco", "tokens": 1}, image_sft=SFT)


@pytest.mark.slow
def test_a_run_without_a_token_to_learn_from_fails_and_says_why(root: Path, aligned: Path) -> None:
    with pytest.raises(JobFailed, match=r"no token to learn from: answers are cut .*, or turns end with a question"):
        pipelines.run(untaught(root, "nothing", uri=str(root / "images-test")))


def test_a_run_without_a_sample_is_refused(root: Path, aligned: Path) -> None:
    with pytest.raises(Refused, match=r"inputs\.samples: an epoch of these tables with these weights has no sample"):
        pipelines.run(untaught(root, "few", uri=str(root / "images"), weight=0.01))


def test_a_sweep_trains_every_trial_and_scores_it_against_its_own_bounds(sweep_output: Path) -> None:
    table = parquet.read_table(str(sweep_output / "trials" / "part-00000.parquet")).to_pylist()
    overall = {(row["trial"], row["method"]): row for row in table if row["category"] == "all"}
    assert set(overall) == {("none-1", "none"), ("none-1", "lower_bound"), ("voco-2", "voco"), *POOLED}
    upper, lower = overall["none-1", "none"]["score"], overall["none-1", "lower_bound"]["score"]
    for key in (("voco-2", "voco"), *POOLED):
        assert (overall[key]["upper_bound"], overall[key]["lower_bound"]) == (upper, lower)
        assert overall[key]["questions"] == 20
        assert overall[key]["train_seconds"] > 0
    parents = {parent["uri"] for parent in manifest.read_manifest(str(sweep_output)).parents}  # type: ignore[union-attr]
    assert str(sweep_output / "runs" / "voco-2" / "train") in parents
    starts = {name: state(sweep_output / "runs" / name / "train") for name in ("none-1", "voco-2")}
    assert any(not torch.equal(starts["none-1"][name], starts["voco-2"][name]) for name in starts["none-1"])


def test_a_trained_q_former_continues_only_with_its_own_shape(root: Path, aligned: Path, sweep_output: Path) -> None:
    """The trial drew its Q-Former from the seed, beside the aligned checkpoint, and trained every part of it."""
    trained = str(sweep_output / "runs/q-former-2/train")
    assert weights.read_config(trained)["layout"]["q_former_layers"] == 2
    layout = weights.load_checkpoint(trained).layout
    before = weights.own_state(weights.load_checkpoint(str(aligned), layout, method_seed=0))
    after = weights.own_state(weights.load_checkpoint(trained))
    reader = [name for name in after if name.startswith("q_former.")]
    # a key's bias shifts all scores of a query equally, so it gets no gradient
    assert all(not torch.equal(before[name], after[name]) for name in reader if not name.endswith("key.bias"))
    losses = parquet.read_table(f"{trained}/metrics.parquet")["loss"].to_pylist()
    assert losses[-1] < losses[0]
    inputs = {**samples(root, "images"), "features": str(root / "features"), "checkpoint": trained}
    other = {"method": "q_former", "tokens": 3}
    with pytest.raises(Refused, match="the checkpoint's Q-Former has 2 queries and 2 layers, got 3 and 2"):
        pipelines.run(job("image_sft", root / "other-queries", inputs, compression=other, image_sft=SFT))


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [None, "runs/none-1/train"], ids=["itself", "another"])
def test_a_model_learns_from_the_uncompressed_one(root: Path, sweep_output: Path, teacher: str | None) -> None:
    inputs = {
        **samples(root, "images"),
        "features": str(root / "features"),
        "checkpoint": str(sweep_output / "runs/voco-2/train"),
    }
    # when a model teaches itself, the hard labels pull student and teacher apart again: the divergence need not fall
    block = {**SFT, "epochs": 4, "zero_stage": 3 if teacher else 2, "distill": {"weight": 5.0, "temperature": 2.0}}
    if teacher:
        inputs["teacher"] = str(sweep_output / teacher)
    output = root / f"taught-{'other' if teacher else 'self'}"
    done = pipelines.run(job("image_sft", output, inputs, compression={"method": "voco", "tokens": 2}, image_sft=block))
    table = parquet.read_table(str(output / "metrics.parquet"))
    kl, loss = table["kl"].to_pylist(), table["loss"].to_pylist()
    assert all(5.0 * 4.0 * divergence < total for divergence, total in zip(kl, loss, strict=True))
    if teacher:
        assert sum(kl[-3:]) < sum(kl[:3])
        assert inputs["teacher"] in [parent["uri"] for parent in done.parents]


def test_a_teacher_of_another_kind_is_refused(root: Path, aligned: Path, sweep_output: Path) -> None:
    inputs = {**samples(root, "images"), "features": str(root / "features"), "checkpoint": str(aligned)}
    block = {**SFT, "distill": {"weight": 1.0}}
    small = world.untrained(str(root / "small"), "none", texts=["its vocabulary is another"])
    for teacher, message in ((sweep_output / "runs/voco-2/train", "of method none"), (Path(small), "another vocabulary")):
        taught = {**inputs, "teacher": str(teacher)}
        student = job(
            "image_sft", root / f"no-{teacher.name}", taught, compression={"method": "voco", "tokens": 2}, image_sft=block
        )
        with pytest.raises(Refused, match=f"inputs.teacher: .*{message}"):
            pipelines.run(student)


def test_a_finished_sweep_is_left_alone_and_only_a_lost_trial_runs_again(root: Path, sweep_output: Path, capfd: Any) -> None:
    again = pipelines.run(sweep(root, sweep_output))
    assert "done already" in capfd.readouterr().out
    assert again.kind == "sweep"
    before = (sweep_output / "runs/voco-2/train/manifest.json").read_bytes()
    (sweep_output / "manifest.json").unlink()
    shutil.rmtree(sweep_output / "runs" / "avg-pool-1")
    pipelines.run(sweep(root, sweep_output))
    assert (sweep_output / "runs/voco-2/train/manifest.json").read_bytes() == before
    assert (sweep_output / "runs/avg-pool-1/train/manifest.json").exists()


def test_an_impossible_trial_is_reported_by_its_name(root: Path, aligned: Path) -> None:
    raw = sweep(root, root / "bad").model_dump(exclude_none=True)
    raw["sweep"]["axes"] = {"compression": [{"method": "avg_pool", "tokens": 3}]}  # no divisor of four positions
    with pytest.raises(JobFailed, match=r"avg-pool-3.*divisor"):
        pipelines.run(Job.model_validate(raw))


def test_frame_caches_hold_every_video_and_image_once(root: Path, frame_caches: Path) -> None:
    index = parquet.read_table(str(frame_caches / "index.parquet")).to_pylist()
    by_sample = {line["sample_id"]: line["frames"] for line in index}
    listed = [row for name in ("videos", "videos-test", "images") for row in rows_of(root / name)]
    expected = {row["sample_id"]: video_world.SECONDS if row["modality"] == "video" else 1 for row in listed if row["media"]}
    assert by_sample == expected
    done = manifest.read_manifest(str(frame_caches))
    assert done is not None
    assert done.counts["written"] == sum(expected.values())
    assert done.statistics["bytes_per_frame"] == 2 * 2 * 2 * 8 * 2 * 4  # K and V, layers, kv heads, head width, N, fp32


def rows_of(output: Path) -> list[dict[str, Any]]:
    with pq.ParquetFile(output / "samples" / "part-00000.parquet") as file:
        return file.read(columns=["sample_id", "modality", "media.list.element.sha256"]).to_pylist()


def test_a_video_model_keeps_its_frozen_compressor(video_model: Path, sweep_output: Path) -> None:
    image = weights.read_config(str(sweep_output / "runs/voco-2/train"))
    video = weights.read_config(str(video_model))
    assert video["compressor"] == image["compressor"]
    assert weights.load_compressor(str(video_model)).compressor == image["compressor"]
    trained, start = state(video_model), state(sweep_output / "runs/voco-2/train")
    moved = {name.split(".")[0] for name in trained if not torch.equal(trained[name], start[name])}
    assert moved == {"language_model"}
    losses = parquet.read_table(str(video_model / "metrics.parquet"))["loss"].to_pylist()
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_zero_2_and_3_train_the_same_video_model(root: Path, frame_caches: Path) -> None:
    left, right = (state(train_video(root, frame_caches, zero_stage)) for zero_stage in (2, 3))
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-4


def test_answers_about_videos_in_order_shuffled_and_from_one_frame(root: Path, video_model: Path, frame_caches: Path) -> None:
    answers_by_frames = {}
    for frames in ("all", "shuffled", "one"):
        inputs = {**samples(root, "videos-test"), "frame_cache": str(frame_caches), "checkpoint": str(video_model)}
        output = root / f"answers-{video_model.name}-{frames}"
        block = {"benchmark": "shades", "frames": frames, "resamples": 100}
        pipelines.run(job("evaluate", output, inputs, evaluate=block))
        answers_by_frames[frames] = parquet.read_table(str(output / "answers" / "part-00000.parquet")).to_pylist()
    assert {frames: answers[0]["method"] for frames, answers in answers_by_frames.items()} == {
        "all": "voco", "shuffled": "shuffled_frames", "one": "one_frame",
    }  # fmt: skip
    assert [len(answers) for answers in answers_by_frames.values()] == [16, 16, 16]
    last = parquet.read_table(str(video_model / "metrics.parquet")).to_pylist()[-1]
    marks = [answer["correct"] for answer in answers_by_frames["all"][:12]]  # of the 6 rows that training validated on
    assert last["val_loss"] > 0
    assert last["val_score"] == (pytest.approx(sum(marks) / 12) if video_model.name == "video-2" else None)


def test_a_video_model_does_not_compress_images_itself(root: Path, video_model: Path) -> None:
    """Its caches come from its frozen compressor: images are one-frame media of a frame cache."""
    inputs = {**samples(root, "images-test"), "features": str(root / "features"), "checkpoint": str(video_model)}
    with pytest.raises(Refused, match=r"inputs\.features: this checkpoint reads the caches of a frozen compressor"):
        pipelines.run(job("evaluate", root / f"wrong-{video_model.name}", inputs, evaluate={"benchmark": "halves"}))


def test_a_video_job_on_foreign_caches_is_refused(root: Path, sweep_output: Path, frame_caches: Path) -> None:
    """Caches of the voco-2 model cannot be read by a job that starts from another checkpoint."""
    inputs = {**samples(root, "videos"), "frame_cache": str(frame_caches), "checkpoint": str(sweep_output / "runs/none-1/train")}
    block = {**SFT, "epochs": 1}
    with pytest.raises(Refused, match="was made with compressor"):
        pipelines.run(job("video_sft", root / "foreign", inputs, compression={"method": "voco", "tokens": 2}, video_sft=block))
    inputs["checkpoint"] = str(sweep_output / "runs/voco-2/train")
    few = {**block, "max_tokens": 8}
    with pytest.raises(Refused, match="max_frames: a sample has 4 frames of 2 tokens"):
        pipelines.run(job("video_sft", root / "foreign2", inputs, compression={"method": "voco", "tokens": 2}, video_sft=few))
    inputs = {**samples(root, "videos"), "checkpoint": str(sweep_output / "runs/none-1/train")}
    with pytest.raises(Refused, match="frame caches need a checkpoint of method voco, got none"):
        pipelines.run(job("frame_cache", root / "foreign3", inputs, frame_cache={"fps": 1.0}))
    assert not storage.exists(str(root / "foreign" / "manifest.json"))
