"""Training with an adapter: the job's keys, ZeRO's stages, and the real chain from images to answers about videos."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
import video_world
import world
from ranks import launch_ranks
from safetensors.torch import load_file
from stored_features import write_features

import pipelines
import voco.model
from voco.commands import plan
from voco.errors import Refused
from voco.job.config import Lora
from voco.job.load import build_job
from voco.job.run_id import hashed_content
from voco.job.spec import Job
from voco.job.trials import sweep_trials
from voco.model import adapter, weights
from voco.model.checkpoint_layout import compressor_uri
from voco.report.table import bytes_text
from voco.run import manifest
from voco.store import parquet
from voco.train import preflight
from voco.train.initial_model import initial_model

HERE = Path(__file__).parent
PARTS = ("model/model.safetensors", "adapter/adapter_model.safetensors")
LORA = {"rank": 4}
SIZE = plan.InputSize(None, None, "not made yet")
SFT: dict[str, Any] = {
    "name": "sft", "kind": "image_sft", "output": "out", "model": shapes.MODEL, "compression": {"method": "voco", "tokens": 1},
    "inputs": {"samples": [{"uri": "samples"}]},
    "image_sft": {"epochs": 1, "global_batch": 8, "micro_batch": 4, "learning_rate": 0.01},
}  # fmt: skip


def with_lora(lora: Any) -> dict[str, Any]:
    return {**SFT, "image_sft": {**SFT["image_sft"], "lora": lora}}


def test_a_job_names_the_layers_by_group_or_by_name() -> None:
    assert Lora(rank=8).layers == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert Lora(rank=8, targets="attention").layers == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert Lora(rank=8, targets=["v_proj"]).layers == ("v_proj",)
    assert (Lora(rank=8).full_alpha, Lora(rank=8, alpha=4.0).full_alpha) == (16, 4.0)


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ({}, "x.yaml: image_sft.lora.rank: expected a value"),
        ({"rank": 0}, "x.yaml: image_sft.lora.rank: "),
        ({"rank": 4, "dropout": 0.1}, "x.yaml: image_sft.lora.dropout: expected 0, because"),
        ({"rank": 4, "targets": ["v_proj", "v_proj"]}, "x.yaml: image_sft.lora.targets: expected each layer once"),
        ({"rank": 4, "targets": ["v_prj"]}, "x.yaml: image_sft.lora.targets"),
        ({"rank": 4, "targets": "mlp"}, "x.yaml: image_sft.lora.targets"),
        ({"rank": 4, "target": "linear"}, "x.yaml: image_sft.lora.target: unknown key; did you mean targets"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(lora: dict[str, Any], line: str) -> None:
    with pytest.raises(Refused) as error:
        build_job("x.yaml", with_lora(lora))
    assert str(error.value).startswith(line), str(error.value)


def test_without_the_package_the_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    job = build_job("x.yaml", with_lora(LORA))
    preflight.check_adapter(job)
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(Refused, match=r"^image_sft\.lora: needs the package peft: pip install 'voco\[lora\]'$"):
        preflight.check_adapter(job)
    preflight.check_adapter(build_job("x.yaml", SFT))


def test_jobs_without_an_adapter_keep_their_run_ids() -> None:
    assert "lora" not in hashed_content(build_job("x.yaml", SFT))["image_sft"]
    assert hashed_content(build_job("x.yaml", with_lora(LORA)))["image_sft"]["lora"]["rank"] == 4


def test_an_axis_may_be_its_rank_or_whether_there_is_one() -> None:
    evaluate = {"name": "e", "kind": "evaluate", "inputs": {"samples": [{"uri": "t"}], "checkpoint": "@train"}}
    evaluate["evaluate"] = {"benchmark": "gqa"}

    def trials(axes: dict[str, list[Any]], lora: Any) -> list[Job]:
        sweep = {"axes": axes, "train": with_lora(lora), "evaluate": evaluate}
        job = build_job("s.yaml", {"name": "s", "kind": "sweep", "output": "o", "sweep": sweep})
        return [trial.train for trial in sweep_trials(job)]

    ranks = trials({"image_sft.lora.rank": [2, 8]}, {"rank": 4, "targets": "attention"})
    assert [(job.block.lora.rank, job.block.lora.full_alpha, job.block.lora.targets) for job in ranks] == [
        (2, 4, "attention"),
        (8, 16, "attention"),
    ]
    every = trials({"image_sft.lora": [None, {"rank": 2}, {"rank": 2, "dora": True}]}, None)
    assert [job.block.lora and job.block.lora.dora for job in every] == [None, False, True]


def test_plan_says_what_is_trained_and_what_a_checkpoint_takes() -> None:
    """By hand, for two layers of width 32, 4 heads and 2 of keys, an MLP of 48 and 112 vision features."""
    job = build_job("x.yaml", with_lora({"rank": 4}))
    (line,) = [line for line in plan.training_plan(job, {"inputs.samples[0].uri": SIZE}) if line.startswith("LoRA")]
    layer = 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32) + 3 * (32 + 48))
    trained = 2 * layer + 32  # and the row of <voco>
    saved = trained + 112 * 32 + 32 * 32 + 2 * 32
    assert trained == 3744
    assert line.startswith(
        "LoRA: rank 4, alpha 8, on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: 3,744 trained"
    )
    assert line.endswith(f"a checkpoint has {bytes_text(12 * saved)}")
    (memory,) = [line for line in plan.training_plan(job, {"inputs.samples[0].uri": SIZE}) if line.startswith("memory")]
    assert "x 2 + 3,744 x (2 + 12)) bytes" in memory
    dora = build_job("x.yaml", with_lora({"rank": 1, "targets": ["k_proj"], "dora": True}))
    lines = plan.training_plan(dora, {"inputs.samples[0].uri": SIZE})
    assert any(line.startswith(f"DoRA: rank 1, alpha 2, on k_proj: {2 * (32 + 16 + 16) + 32} trained") for line in lines)


@pytest.mark.slow
def test_every_zero_stage_trains_the_same_adapter(tmp_path: Path) -> None:
    """On one rank and on two, sharded or not: the same losses, factors and merged weights; frozen weights keep every bit."""
    root = str(tmp_path)
    world.write_samples(f"{root}/samples", world.sample_rows(16, text_every=4))
    write_features(f"{root}/features", [f"{root}/samples"])
    initial_model(world.sft_job(f"{root}/samples", f"{root}/features", f"{root}/out"), root)
    kinds = {"lora": {"rank": 4}, "dora": {"rank": 3, "targets": "attention", "dora": True}}

    def cases(label: str, **keys: Any) -> list[dict[str, Any]]:
        return [{"name": f"{kind}-{label}", "lora": lora, **keys} for kind, lora in kinds.items()]

    def train(ranks: int, cases: list[dict[str, Any]]) -> None:
        launch_ranks(HERE / "adapter_ranks.py", ranks, root, *map(json.dumps, cases))

    train(1, cases("plain", zero_stage=1))
    recomputed = cases("recomputed", zero_stage=3, checkpoint_activations=True)
    train(2, [*cases("z1", zero_stage=1), *cases("z2", zero_stage=2), *cases("z3", zero_stage=3), *recomputed])
    start = load_file(f"{root}/initial/model/model.safetensors")
    for kind, keys in kinds.items():
        expected = {part: load_file(f"{root}/{kind}-plain/{part}") for part in PARTS}
        losses = parquet.read_table(f"{root}/{kind}-plain/metrics.parquet")["loss"].to_pylist()
        assert losses[3] < losses[1]
        for label in ("z1", "z2", "z3", "recomputed"):
            other = parquet.read_table(f"{root}/{kind}-{label}/metrics.parquet")["loss"].to_pylist()
            assert other == pytest.approx(losses, rel=1e-5), label
            for part in PARTS:
                tensors = load_file(f"{root}/{kind}-{label}/{part}")
                assert tensors.keys() == expected[part].keys()
                for name, tensor in tensors.items():
                    assert torch.allclose(tensor, expected[part][name], rtol=1e-4, atol=1e-5), (kind, label, name)
        merged, lora = expected[PARTS[0]], Lora(**keys)
        changed = {name for name in merged if not torch.equal(merged[name], start[name])}
        adapted = {name for name in changed if name.rsplit(".", 2)[-2] in lora.layers}
        assert len(adapted) == 2 * len(lora.layers)
        assert changed - adapted == {adapter.EMBEDDING, *(name for name in merged if name.startswith("projector."))}
        voco_id = weights.read_config(f"{root}/initial")["layout"]["voco_id"]
        moved = (merged[adapter.EMBEDDING] != start[adapter.EMBEDDING]).any(dim=1).nonzero().flatten().tolist()
        assert moved == [voco_id]


@pytest.mark.ray
@pytest.mark.slow
def test_from_images_to_answers_about_videos(ray_local: str, tmp_path: Path) -> None:
    """image_sft, frame_cache, video_sft and evaluate with adapters, as a user runs them; `peft` reads what they wrote."""
    from peft import PeftModel

    root = str(tmp_path)
    world.write_samples(f"{root}/images", world.sample_rows(24))
    world.write_samples(f"{root}/clips", video_world.sample_rows(12))
    world.write_samples(f"{root}/test", video_world.sample_rows(4, evaluation=True, first=50))
    pipelines.run(world.features_job([f"{root}/images"], f"{root}/features"))
    start = world.untrained(f"{root}/start", "voco", texts=["what color is the left?", "does it get brighter or darker?"])
    lora = {"rank": 4, "dora": True}
    image = pipelines.run(
        world.sft_job(f"{root}/images", f"{root}/features", f"{root}/sft", checkpoint=start, lora=lora, epochs=3)
    )
    assert {entry["path"] for entry in image.tables["adapter"]} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    losses = parquet.read_table(f"{root}/sft/metrics.parquet")["loss"].to_pylist()
    assert losses[-1] < losses[0]

    merged, base = voco.model.load(f"{root}/sft"), voco.model.load(start)
    for model in (merged, base):
        model.language_model.set_attn_implementation("sdpa")
    ids = torch.tensor([[merged.layout.voco_id, *range(20, 60), merged.layout.voco_id, 9]])
    expected = merged.language_model(ids).logits.detach()
    adapted = PeftModel.from_pretrained(base.language_model, f"{root}/sft/adapter")(ids).logits
    assert (adapted - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))

    job = {"resources": {"workers": 2}, "inputs": {"checkpoint": f"{root}/sft"}}
    samples = [{"uri": f"{root}/clips"}]
    cache = {**job, "name": "cache", "kind": "frame_cache", "output": f"{root}/cache", "frame_cache": {"fps": 1.0}}
    cache["inputs"] = {**job["inputs"], "samples": [*samples, {"uri": f"{root}/test"}]}
    pipelines.run(Job.model_validate(cache))
    block = {"epochs": 3, "global_batch": 4, "micro_batch": 2, "learning_rate": 0.01, "precision": "fp32", "lora": {"rank": 2}}
    video = {**job, "name": "video", "kind": "video_sft", "output": f"{root}/video", "video_sft": {**block, "zero_stage": 3}}
    video |= {"compression": {"method": "voco", "tokens": 1}}
    video["inputs"] = {**job["inputs"], "samples": samples, "frame_cache": f"{root}/cache"}
    pipelines.run(Job.model_validate(video))
    names = load_file(f"{root}/video/adapter/adapter_model.safetensors")
    assert adapter.PEFT_ROW not in names, "<voco> is in the caches"
    compressor = load_file(f"{compressor_uri(f'{root}/video')}/model/model.safetensors")
    image_state, video_state = (load_file(f"{root}/{name}/model/model.safetensors") for name in ("sft", "video"))
    assert all(torch.equal(compressor[name], image_state[name]) for name in image_state), "its compressor is its base"
    changed = {name for name in video_state if not torch.equal(video_state[name], image_state[name])}
    assert {name.rsplit(".", 2)[-2] for name in changed} == set(Lora(rank=2).layers)
    assert weights.read_config(f"{root}/video")["compressor"] == weights.read_config(f"{root}/sft")["compressor"]

    clip = weights.load_compressor(f"{root}/video").compress_images([world.picture(0)[0]] * 2)
    assert voco.model.load(f"{root}/video").generate(clip, "does it get brighter or darker?", 4)

    ask = {**job, "name": "ask", "kind": "evaluate", "output": f"{root}/ask"}
    ask |= {"evaluate": {"benchmark": "shades", "max_new_tokens": 4, "resamples": 100}}
    ask["inputs"] = {"checkpoint": f"{root}/video", "samples": [{"uri": f"{root}/test"}], "frame_cache": f"{root}/cache"}
    pipelines.run(Job.model_validate(ask))
    assert manifest.read_manifest(f"{root}/ask") is not None
