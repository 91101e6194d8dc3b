"""The costs in `voco plan`: shapes equal transformers' own counts, bytes equal what real stages write, and a paper-sized flow."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ingest import source
from job.test_spec import TRAIN, changed
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import pipelines
from voco.commands import costs, estimate, plan, shapes
from voco.commands.estimate import Estimate, Volume
from voco.commands.rates import Rates, read_rates
from voco.commands.training_memory import teacher_memory
from voco.commands.validation_cost import validation_hours, validation_lines, with_validation
from voco.errors import Refused
from voco.job.config import FrameCache, Llama, Model, Tower, Training, VideoSft
from voco.job.load import build_job, load_job
from voco.job.resources import Resources
from voco.model.efficiency import SHAPES, TOWER
from voco.model.flops import image_flops
from voco.store.s3 import PatientS3

CLIP = Tower(name="clip", image_size=336, path="openai/clip-vit-large-patch14-336", layer=-2)
PAPER = Path(__file__).parents[2] / "jobs" / "paper" / "flow.yaml"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_parameters_are_those_of_transformers(kv_heads: int, tied: bool) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=kv_heads,
        vocab_size=500, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert shapes.count_parameters(config) == sum(weight.numel() for weight in model.parameters())


def test_the_published_size_of_vicuna_7b() -> None:
    llama = Llama(layers=32, width=4096, heads=32, kv_heads=32, mlp_width=11008, vocabulary=32000)
    assert shapes.count_parameters(shapes.llama_config(llama)) == 6_738_415_616


def test_the_tower_counts_as_the_efficiency_table_does() -> None:
    tower = shapes.tower_shape(CLIP)
    assert (tower.slots, tower.width, tower.assumed) == (576, 1024, True)
    nothing = SimpleNamespace(hidden_size=0)
    assert tower.flops == pytest.approx(image_flops(nothing, TOWER), rel=1e-12)
    with torch.device("meta"):
        vit = CLIPVisionModel(CLIPVisionConfig(**{**TOWER.to_dict(), "num_hidden_layers": 23}))
    # but for biases, norms and the class token
    assert tower.parameters == pytest.approx(sum(weight.numel() for weight in vit.parameters()), rel=0.01)


def shape_7b(method: str = "voco", tokens: int = 1) -> shapes.ModelShape:
    return shapes.ModelShape(SHAPES["7B"], shapes.tower_shape(CLIP), method, tokens)


def test_the_tower_is_one_percent_of_a_step_at_7b() -> None:
    """performance_anchors: about 30 TFLOP a sample of 171 text tokens, and the tower's forward pass."""
    block = Training(epochs=1, global_batch=128, micro_batch=8, learning_rate=2e-5)
    volume = Volume(conversations=128, media=128, media_bytes=128 * 100_000, text_tokens=128 * 171)
    resources = Resources(workers=8, gpus_per_worker=1, accelerator="A100")

    def step(stored: bool) -> Estimate:
        return estimate.training([(volume, 1.0)], shape_7b(), block, resources, Rates(), aligns=False, stored_features=stored)

    stored, live = step(stored=True), step(stored=False)
    assert stored.flops / 128 == pytest.approx(30e12, rel=0.05)
    assert 0.005 < live.flops / stored.flops - 1 < 0.02
    assert stored.tokens == 128 * (2 + 576 + 1 + 171)
    assert stored.steps == 1


def test_a_frame_of_two_tokens_is_one_mebibyte_at_7b() -> None:
    hour, model = Volume(media=1, videos=1, seconds=3600), shape_7b(tokens=2)
    for dtype, frame in ((None, 1 << 20), ("bf16", 1 << 20), ("int8", 532_480), ("fp8", 532_480)):
        cache = FrameCache(fps=1.0, dtype=dtype)
        assert model.frame_bytes(dtype) == frame
        assert estimate.frame_cache(hour, model, cache, Resources(), Rates()).written == pytest.approx(3600 * frame, rel=0.001)
        block = VideoSft(epochs=1, global_batch=1, micro_batch=1, learning_rate=2e-5)
        assert estimate.video_training([(hour, 1.0)], model, block, cache, Resources(), Rates()).read == 3600 * frame


def test_frames_are_limited_and_images_are_one_frame() -> None:
    mixed = Volume(media=12, videos=2, seconds=2 * 100.0)
    assert mixed.frames(FrameCache(fps=1.0, max_frames=30)) == 10 + 2 * 30
    assert mixed.frames(FrameCache(frames=8)) == 10 + 2 * 8


def test_rows_without_media_are_trained_on_too() -> None:
    volume = Volume(conversations=300, media=90, samples=100)
    shared = Training(epochs=1, global_batch=10, micro_batch=1, learning_rate=2e-5)
    apart = Training(epochs=1, global_batch=10, micro_batch=1, learning_rate=2e-5, share_vision=False)
    assert (volume.batch_items(shared), volume.batch_items(apart)) == (100, 300)


def test_a_checkpoint_in_fp32_makes_caches_of_four_bytes_a_number() -> None:
    assert replace(shape_7b(), bytes_per_number=4).frame_bytes(None) == 2 * shape_7b().frame_bytes("bf16")


def test_a_language_model_directory_may_leave_sizes_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"vocab_size": 32064}}))
    model = shapes.new_model(Model(pretrained=str(tmp_path)))
    assert model is not None
    assert (model.config.num_key_value_heads, model.config.vocab_size, model.tower.slots) == (32, 32064, 576)


def test_storage_that_does_not_answer_gives_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    PatientS3.clear_instance_cache()  # another test's server may be cached
    raw = {"name": "x", "kind": "frame_cache", "output": "s3://nowhere/out", "expect": {"rows": 9, "bytes": 9}}
    raw |= {"inputs": {"samples": [{"uri": "s3://nowhere/s"}], "checkpoint": "s3://nowhere/c"}, "frame_cache": {"fps": 1.0}}
    job = build_job("job.yaml", raw)
    assert costs.cost_lines(job, Rates()) == ["costs: not estimated: x needs a checkpoint that can be read here"]
    assert "at 7B with N = 1 524,288" in "\n".join(plan.plan_lines("job.yaml", job))


def test_a_job_that_reads_stored_features_says_so() -> None:
    raw = changed(TRAIN, "inputs", {"samples": [{"uri": "s3://YOUR-BUCKET/a"}], "features": "s3://YOUR-BUCKET/f"})
    raw["expect"] = {"rows": 1000, "bytes": 5 << 20}
    lines = costs.cost_lines(build_job("job.yaml", raw), Rates())
    assert lines[0].split()[:4] == ["stage", "read", "written", "steps"]
    assert [line.split()[0] for line in lines] == ["stage", "train", "saves:", "vision:", "assumed:"]
    assert "stored features (this job)" in lines[3]


def test_a_new_model_is_written_before_it_is_trained() -> None:
    """What a run of this shape wrote: each checkpoint 12 bytes a parameter, and the model twice."""
    job = build_job("job.yaml", {**TRAIN, "expect": {"rows": 1000, "bytes": 5 << 20}})
    model = shapes.new_model(job.model)
    assert model is not None
    parameters = model.parameters + model.projector_parameters
    saves = math.ceil(1000 / job.block.global_batch * job.block.epochs / job.block.save_every)
    number = 2 if job.block.precision == "bf16" else 4
    whole = 2 * 4 * model.tower.parameters + (4 + number) * parameters
    written = costs.stage_estimates(job, Rates())["train"].written
    assert written == saves * 12 * parameters + whole


def step_memory(workers: int = 1, gpus: int = 1, **changes: Any) -> Estimate:
    values = {"epochs": 1, "global_batch": 128, "micro_batch": 8, "learning_rate": 2e-5, "checkpoint_activations": True}
    block = Training.model_validate(values | changes)
    volume = Volume(conversations=1280, media=1280, media_bytes=1e6, text_tokens=1280 * 171)
    resources = Resources(workers=workers, gpus_per_worker=gpus, accelerator="A100")
    return estimate.training([(volume, 1.0)], shape_7b(), block, resources, Rates(), aligns=False, stored_features=True)


def test_a_teacher_is_complete_on_every_worker_or_a_shard_and_its_head() -> None:
    """As `train/teacher.py` places it; bench/load_memory.py measures the sharded form."""
    model, resources = shape_7b(), Resources(workers=8, gpus_per_worker=1)
    values = {"epochs": 1, "global_batch": 128, "micro_batch": 8, "learning_rate": 2e-5}
    complete, sharded = (
        teacher_memory(model, Training.model_validate({**values, "zero_stage": stage}), resources) for stage in (2, 3)
    )
    assert complete == 2 * model.parameters
    head = 32_000 * 4096
    assert sharded == pytest.approx(2 * (model.parameters / 8 + head * 7 / 8))
    block, volume = Training.model_validate(values), Volume(conversations=128, media=128, media_bytes=1e6, text_tokens=128 * 171)
    arguments: Any = ([(volume, 1.0)], model, block, resources, Rates(), False, True)
    alone, taught = (estimate.training(*arguments, has_teacher=given) for given in (False, True))
    assert taught.gpu == {**alone.gpu, "teacher": complete}


def test_a_token_budget_bounds_the_activations() -> None:
    """750 tokens a sample: 8 samples are 6,000 tokens."""
    by_samples, by_tokens = step_memory(), step_memory(micro_batch=None, micro_tokens=6000)
    assert by_tokens.gpu["activations"] == pytest.approx(by_samples.gpu["activations"])
    half = step_memory(micro_batch=None, micro_tokens=3000)
    assert half.gpu["activations"] == pytest.approx(by_samples.gpu["activations"] / 2)
    everything = step_memory(workers=64, micro_batch=None, micro_tokens=1 << 20)
    assert everything.gpu["activations"] == pytest.approx(by_samples.gpu["activations"] / 4), "a step has 2 samples a worker"


def test_offloaded_parts_are_in_host_memory() -> None:
    plain, states = step_memory(zero_stage=3), step_memory(zero_stage=3, offload="optimizer")
    all_parts = step_memory(zero_stage=3, offload="parameters")
    parameters = plain.gpu["weights"] / 2
    assert plain.gpu["Adam"] == states.host["Adam, from the GPU"] == 12 * parameters
    assert not {"Adam", "gradients"} & states.gpu.keys()
    assert "weights" not in all_parts.gpu
    assert all_parts.host["weights, from the GPU"] == 2 * parameters
    assert all_parts.host["gradients of the update, fp32"] == 4 * parameters
    # 7B on a GPU of 24 GB, with all parts in host memory: what is gathered, buckets and activations
    assert sum(all_parts.gpu.values()) < 8e9 < sum(states.gpu.values()) < 24e9 < sum(plain.gpu.values())


def test_buffers_and_sums_in_fp32_are_memory_of_gpus_only() -> None:
    on_gpu, on_cpu = step_memory(workers=8), step_memory(workers=8, gpus=0)
    share = on_gpu.gpu["weights"] / 2 / 8
    assert on_gpu.gpu["gradients"] == pytest.approx(4 * share)  # two micro-batches are added in fp32
    assert on_cpu.gpu["gradients"] == pytest.approx(2 * share)
    assert on_gpu.gpu["ZeRO's buffers"] >= 2 * 2 * (1 << 24)
    assert "ZeRO's buffers" not in on_cpu.gpu


def test_a_sweep_takes_the_sum_over_what_runs_at_a_time() -> None:
    parts = [Estimate(hours={"compute": 3.0, "storage": 1.0}), Estimate(hours={"storage": 2.0})]
    together = estimate.together(parts, at_a_time=2)
    assert together.duration == 2.5
    assert together.bottleneck == "compute"


def test_ingest_writes_what_the_estimate_says(tmp_path: Path) -> None:
    folder, draw = tmp_path / "source", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(24):
        Image.fromarray(draw.integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(folder / "images" / f"{index}.jpg")
        turns = [
            {"from": "human", "value": f"<image>\nWhat is number {index}?"},
            {"from": "gpt", "value": "Noise. " * (index + 1)},
        ]
        rows.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(rows))
    job = source.job(folder, tmp_path / "out")
    done = pipelines.run(job)
    written = sum(entry["bytes"] for entry in done.tables["samples"])
    assert costs.stage_estimates(job, Rates())[job.name].written == pytest.approx(written, rel=0.05)


def test_the_papers_flow_fits_a_screen_and_names_its_bottleneck(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("nodes: {A100: {gpus: 8, cpus: 96, per_hour: 30.0}, cpu: {cpus: 64, per_hour: 3.0}}\n")
    lines = costs.cost_lines(load_job(str(PAPER)), read_rates(str(prices)))
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 170
    text = "\n".join(lines)
    assert "?" not in text  # every stage has an estimate
    assert "compute of sweep" in text
    assert "USD" in text
    assert "live tower" in text


def test_a_job_of_unknown_size_says_what_is_missing() -> None:
    job = load_job(str(PAPER))
    stages = [stage.model_copy(update={"expect": None}) for stage in job.stages]
    unknown = job.model_copy(update={"flow": job.block.model_copy(update={"stages": stages})})
    (line,) = costs.cost_lines(unknown, Rates())
    assert line.startswith("costs: not estimated: cc3m, llava665k, gqa,")
    assert line.endswith(" need `expect: {rows, bytes}`")


def test_prices_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("mfuu: 0.5\n")
    with pytest.raises(Refused, match="mfuu: unknown key; did you mean mfu"):
        read_rates(str(file))
    for text in ("[1", "3", "\x00"):
        file.write_text(text)
        with pytest.raises(Refused, match=r"prices\.yaml: ") as refused:
            read_rates(str(file))
        assert "\n" not in str(refused.value)
    with pytest.raises(Refused, match=r"--prices: .*none\.yaml: No such file"):
        read_rates(str(tmp_path / "none.yaml"))
    assert read_rates(None) == Rates()
    rates = Rates.model_validate({"nodes": {"A100": {"gpus": 8, "per_hour": 30}}})
    assert rates.price(Resources(workers=16, gpus_per_worker=1, accelerator="A100"), 2.0) == 120.0
    assert rates.price(Resources(workers=12, gpus_per_worker=1, accelerator="A100"), 2.0) == 120.0  # two whole nodes
    assert rates.price(Resources(workers=4), 2.0) is None


def test_elastic_training_has_the_times_of_both_ends_and_the_memory_of_the_fewest() -> None:
    raw = {**TRAIN, "expect": {"rows": 10**6, "bytes": 10**10}, "output": "s3://YOUR-BUCKET/o"}
    raw["inputs"] = {"samples": [{"uri": "s3://YOUR-BUCKET/a"}]}
    rates = Rates.model_validate({"nodes": {"cpu": {"cpus": 2, "per_hour": 60.0}}})

    def lines(workers: object) -> list[str]:
        return costs.cost_lines(build_job("job.yaml", changed(raw, "resources", {"workers": workers})), rates)

    (_, few, *_), (_, many, *_), (_, elastic, both, *_) = lines(2), lines(8), lines({"min": 2, "max": 8})
    assert both == "train: 56 min and 56 USD with 2 workers, 14 min and 56 USD with 8; memory is that of 2"
    assert elastic != many
    memory = slice(-7, -5)  # before the time of two words, what it is bound by, and the price of two
    assert elastic.split()[memory] == few.split()[memory] != many.split()[memory]
    assert elastic.split()[-5:] == many.split()[-5:]


def test_a_plan_has_the_time_of_validations() -> None:
    raw = {**TRAIN, "inputs": {**TRAIN["inputs"], "val": "@held-out"}, "expect": {"rows": 800, "bytes": 1_000_000}}
    block = TRAIN["image_sft"]
    rates = Rates()

    def seconds(**settings: object) -> float:
        job = build_job("job.yaml", {**raw, "image_sft": {**block, "validate": settings}})
        step = Estimate(steps=100, flops=3 * block["global_batch"] * 2e9, hours={"compute": 1.0, "storage": 0.1})
        hours = validation_hours(job, step, rates)
        added = with_validation(job, step, rates).hours
        assert added == {"compute": 1.0 + hours, "storage": 0.1 + hours}, "it overlaps with nothing"
        (line,) = validation_lines([job], {job.name: step}, rates)
        assert "rows of @held-out" in line
        return 3600 * hours

    workers = build_job("job.yaml", TRAIN).resources.most_workers
    speed = rates.flops(build_job("job.yaml", TRAIN).resources, True) * workers
    assert seconds(every=25, rows=50) == pytest.approx(4 * 50 * 2e9 / speed)
    assert seconds(every=30, rows=50) == pytest.approx(4 * 50 * 2e9 / speed), "every 30 steps, and after the last"
    answers = seconds(every=25, rows=50, answers=True, max_new_tokens=8) - seconds(every=25, rows=50)
    assert answers == pytest.approx(4 * 50 * 8 / rates.decode_tokens_s / workers)
