"""A mistake in a job file is one line that names its key; run ids depend on content and inputs only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import shapes
import yaml

from voco.errors import Refused
from voco.job import load
from voco.job.load import build_job, load_job, resolve_stage
from voco.job.run_id import compute_run_id
from voco.job.trials import sweep_trials

TRAIN: dict[str, Any] = {
    "name": "train",
    "kind": "image_sft",
    "output": "out/train",
    "inputs": {"samples": [{"uri": "a"}], "features": "f"},
    "resources": {"workers": 2},
    "compression": {"method": "voco", "tokens": 1},
    "model": {
        "llama": shapes.llama(mlp_width=64),
        "tower": shapes.tower(image_size=64),
    },
    "image_sft": {"epochs": 1, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.001},
}
INGEST: dict[str, Any] = {
    "name": "take",
    "kind": "ingest",
    "output": "out/take",
    "inputs": {"annotations": "rows.json"},
    "ingest": {"format": "llava_json", "dataset": "d"},
}


def changed(job: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one key set; `path` is dotted."""
    copied = copy.deepcopy(job)
    block = copied
    *parents, last = path.split(".")
    for key in parents:
        block = block[key]
    block[last] = value
    return copied


def of_stages(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"name": "f", "kind": "flow", "output": "o", "flow": {"stages": list(stages)}}


def without(job: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name != key}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed(TRAIN, "image_sft.epoch", 2), "image_sft.epoch: unknown key; did you mean epochs?"),
        (changed(TRAIN, "imagesft", {}), "imagesft: unknown key; did you mean image_sft?"),
        (changed(TRAIN, "model.llama.widht", 32), "model.llama.widht: unknown key; did you mean width?"),
        (changed(TRAIN, "image_sft.epochs", "two"), "image_sft.epochs: expected integer, got 'two'"),
        (changed(TRAIN, "image_sft.epochs", "2"), "image_sft.epochs: expected integer, got '2'"),
        (changed(TRAIN, "compression.tokens", 0), "compression.tokens: expected greater than or equal to 1, got 0"),
        (changed(TRAIN, "compression.tokens", [4, 0]), "compression.tokens[1]: expected greater than or equal to 1, got 0"),
        (changed(TRAIN, "compression.tokens", "2"), "compression.tokens: expected integer, got '2'; write it without quotes"),
        (changed(TRAIN, "compression.draw", "geometrc"), "did you mean geometric?"),
        (changed(TRAIN, "compression.draw", "uniform"), "compression.draw: expected several `tokens` to draw from, got 1"),
        (
            changed(TRAIN, "compression.method", "vocco"),
            "compression.method: expected 'voco', 'none', 'avg_pool' or 'q_former', got 'vocco'",
        ),
        (changed(TRAIN, "compression.method", "vocco"), "did you mean voco?"),
        (changed(TRAIN, "compression.q_former_layers", 2), "expected `q_former_layers` with method q_former only, got voco"),
        (changed(TRAIN, "inputs.teacher", "t"), "inputs.teacher: expected a block image_sft.distill"),
        (
            changed(changed(TRAIN, "image_sft.distill", {"weight": 1.0}), "compression.method", "avg_pool"),
            "image_sft.distill: a network teaches itself under method voco only: got avg_pool",
        ),
        (changed(TRAIN, "kind", "image_stf"), "did you mean image_sft?"),
        (without(TRAIN, "compression"), "compression: expected a block, got nothing"),
        (without(TRAIN, "image_sft"), "image_sft: expected a block, got nothing"),
        (without(TRAIN, "model"), "expected either a `model` block or `inputs.checkpoint`"),
        (
            changed(TRAIN, "resources.workers", 9),
            "resources.workers: expected at most 8 for a global_batch of 8, which has so many shares, got 9",
        ),
        (changed(TRAIN, "resources.workers", {"min": 2, "max": 9}), "resources.workers: expected at most 8 for a global_batch"),
        (changed(TRAIN, "resources.workers", {"min": 4, "max": 2}), "resources.workers: expected min of at most max, got 4"),
        (changed(TRAIN, "resources.workers", {"min": 0, "max": 2}), "resources.workers.min: expected greater than or equal to 1"),
        (changed(TRAIN, "resources.workers", {"min": 2}), "resources.workers.max: expected a value, got nothing"),
        (changed(TRAIN, "resources.workers", {"min": 2, "mx": 8}), "resources.workers.mx: unknown key; did you mean max?"),
        (changed(TRAIN, "resources.workers", "2"), "resources.workers: expected integer, got '2'; write it without quotes"),
        (changed(TRAIN, "resources.workers", [1, 2]), "resources.workers: expected integer, got list"),
        (changed(TRAIN, "image_sft.attention", "flex"), "image_sft.attention: flex trains on GPUs only: expected segments"),
        (changed(without(TRAIN, "model"), "image_sft.attention", "flex"), "image_sft.attention: flex trains on GPUs only"),
        (changed(TRAIN, "image_sft.micro_tokens", 4096), "image_sft: expected either `micro_batch` or `micro_tokens`, got both"),
        (changed(TRAIN, "image_sft.micro_batch", None), "expected either `micro_batch` or `micro_tokens`, got neither"),
        (changed(TRAIN, "image_sft.offload", "parameters"), "offload: parameters can be in host memory under zero_stage 3 only"),
        (changed(changed(TRAIN, "image_sft.compile", True), "image_sft.zero_stage", 3), "compile: not under zero_stage 3"),
        (changed(TRAIN, "image_sft.attention", "aut"), "'auto', 'segments', 'dense', 'varlen' or 'flex'"),
        (changed(TRAIN, "name", "Train 1"), "name: "),
        (without(INGEST, "inputs"), "inputs.annotations: expected a value for a job of kind ingest, got nothing"),
        (changed(INGEST, "inputs.checkpoint", "c"), "inputs.checkpoint: not for a job of kind ingest"),
        (without(INGEST, "output"), "output: expected a path or s3:// URI, got nothing"),
        (changed(INGEST, "report", {}), "report: not for a job of kind ingest"),
        (
            of_stages(without(INGEST, "output"), changed(TRAIN, "inputs.features", "@tkae")),
            "flow.stages[1].inputs.features: expected an earlier stage, got @tkae; did you mean @take?",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_key(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused) as refused:
        build_job("job.yaml", raw)
    assert str(refused.value).startswith("job.yaml: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def train_file(learning_rate: str, name: str = "train") -> str:
    """The text of a job file, with these words as they stand in it."""
    text = yaml.safe_dump(changed(changed(TRAIN, "image_sft.learning_rate", "RATE"), "name", "NAME"))
    return text.replace("RATE", learning_rate).replace("NAME", name)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-5", 2e-5), ("2E-5", 2e-5), ("2.5e-5", 2.5e-5), ("2.e-3", 2e-3), (".2e-4", 2e-5), ("+1e-4", 1e-4), ("1e+0", 1.0),
        ("2.0e-5", 2e-5), ("0.001", 1e-3), (".001", 1e-3),
    ],
)  # fmt: skip
def test_numbers_with_an_exponent_are_numbers(written: str, value: float) -> None:
    """YAML 1.1, and so PyYAML, reads the first seven as text; the core schema of YAML 1.2 as numbers."""
    assert load_job("job.yaml", train_file(written)).block.learning_rate == value


def test_an_exponent_in_the_axis_of_a_sweep_and_names_that_look_like_one() -> None:
    evaluate = {"name": "e", "kind": "evaluate", "inputs": {"samples": [{"uri": "a"}], "checkpoint": "@train", "features": "f"}}
    sweep = {"axes": {"image_sft.learning_rate": "RATES"}, "train": without(TRAIN, "output")}
    sweep["evaluate"] = {**evaluate, "evaluate": {"benchmark": "b"}}
    raw = {"name": "s", "kind": "sweep", "output": "o", "sweep": sweep}
    job = load_job("job.yaml", yaml.safe_dump(raw).replace("RATES", "[1e-4, 2e-5]"))
    assert [trial.train.block.learning_rate for trial in sweep_trials(job)] == [1e-4, 2e-5]
    assert load_job("job.yaml", train_file("1e-3", name='"1e5"')).name == "1e5"  # quotes make it text
    for text in ("1e-3x", "e-5", "1e", "1e-3 x", "0x1e-3", "2024-11-30", "1_0e3"):
        assert not isinstance(yaml.load(text, load._JobLoader), float), text
    for learning_rate, name, message in (
        ("'2e-5'", "train", "image_sft.learning_rate: expected number, got '2e-5'; write it without quotes"),
        ("1e-3", "1e5", "name: expected string, got 100000.0; write it in quotes"),
        ("fast", "train", "image_sft.learning_rate: expected number, got 'fast'"),
    ):
        with pytest.raises(Refused) as refused:
            load_job("job.yaml", train_file(learning_rate, name))
        assert str(refused.value) == f"job.yaml: {message}"


def test_files_that_are_not_jobs(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file"):
        load_job(str(tmp_path / "none.yaml"))
    with pytest.raises(Refused, match="not YAML"):
        load_job("x.yaml", "a: [")
    with pytest.raises(Refused, match="expected a mapping"):
        load_job("x.yaml", "- a")


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    for path in (tmp_path, tmp_path / "picture.yaml"):
        with pytest.raises(Refused, match="expected a YAML file"):
            load_job(str(path))


def test_run_id_follows_content_and_inputs_only() -> None:
    def run_id(raw: dict[str, Any], states: dict[str, str]) -> str:
        return compute_run_id(load_job("x.yaml", yaml.safe_dump(raw)), states)

    base = run_id(TRAIN, {"a": "1"})
    assert base.startswith("train-")
    assert base == run_id(changed(TRAIN, "output", "elsewhere"), {"a": "1"})
    assert base == run_id(changed(TRAIN, "resources.cpus_per_worker", 2), {"a": "1"})
    assert base != run_id(TRAIN, {"a": "2"})
    assert base != run_id(changed(TRAIN, "seed", 1), {"a": "1"})
    assert base != run_id(changed(TRAIN, "image_sft.epochs", 2), {"a": "1"})
    assert base != run_id(changed(TRAIN, "compression.tokens", 2), {"a": "1"})
    weighted = [{**TRAIN["inputs"]["samples"][0], "weight": 2.0}]
    assert base != run_id(changed(TRAIN, "inputs.samples", weighted), {"a": "1"})
    ask = {
        "name": "ask", "kind": "evaluate", "output": "o", "evaluate": {"benchmark": "b"},
        "inputs": {"samples": [{"uri": "s"}], "features": "f", "checkpoint": "c", "upper": "x", "lower": "y"},
    }  # fmt: skip
    swapped = changed(changed(ask, "inputs.upper", "y"), "inputs.lower", "x")
    assert run_id(ask, {"x": "1", "y": "1"}) != run_id(swapped, {"x": "1", "y": "1"})


@pytest.mark.parametrize(
    ("changes", "run_id"),
    [
        ({}, "train-575a8674"),  # of commit 134c529, where segments were the default
        ({"attention": "segments"}, "train-575a8674"),
        ({"compile": True}, "train-575a8674"),
        ({"offload": "optimizer"}, "train-575a8674"),
        ({"zero_stage": 3}, "train-62ea3a9a"),
        ({"zero_stage": 3, "offload": "parameters"}, "train-62ea3a9a"),
        ({"attention": "dense"}, "train-17838685"),
    ],
)
def test_settings_that_change_no_result_change_no_run_id(changes: dict[str, Any], run_id: str) -> None:
    raw = {**TRAIN, "model": {"pretrained": "p"}, "image_sft": {**TRAIN["image_sft"], **changes}}
    assert compute_run_id(build_job("job.yaml", raw), {}) == run_id


def test_a_stage_takes_its_defaults_from_the_flow() -> None:
    train = without(without(changed(TRAIN, "inputs.samples", [{"uri": "@take"}]), "resources"), "output")
    stages = [without(INGEST, "output"), train]
    flow = build_job(
        "f.yaml", {"name": "f", "kind": "flow", "output": "o", "seed": 7, "resources": {"workers": 2}, "flow": {"stages": stages}}
    )
    assert flow.flow is not None
    assert [stage.output for stage in flow.flow.stages] == ["o/take", "o/train"]
    assert {stage.seed for stage in flow.flow.stages} == {7}
    assert flow.flow.stages[1].resources.workers == 2
    real = resolve_stage(flow.flow.stages[1], {"take": "o/take"})
    assert real.inputs.samples[0].uri == "o/take"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"read_as": "fastv"}, "expected {layer: K, keep: share} with `read_as: fastv`, and only with it"),
        ({"fastv": {"layer": 2, "keep": 0.5}}, "expected {layer: K, keep: share} with `read_as: fastv`, and only with it"),
        ({"read_as": "fastv", "fastv": {"layer": 0, "keep": 0.5}}, "evaluate.fastv.layer: expected greater than or equal to 1"),
        ({"read_as": "fastv", "fastv": {"layer": 2, "keep": 1.5}}, "evaluate.fastv.keep: expected less than or equal to 1"),
        ({"tokens": [1], "read_as": "voco"}, "tokens: expected `read_as: own`, got voco"),
        ({"tokens": [1, 1]}, "tokens: expected each N once"),
        ({"tokens": []}, "evaluate.tokens"),
        ({"tokens": [0]}, "evaluate.tokens[0]: expected greater than or equal to 1"),
    ],
)
def test_impossible_ways_to_read_a_checkpoint(block: dict[str, Any], message: str) -> None:
    inputs = {"samples": [{"uri": "a"}], "features": "f", "checkpoint": "c"}
    job = {"name": "ask", "kind": "evaluate", "output": "o", "inputs": inputs, "evaluate": {"benchmark": "gqa", **block}}
    with pytest.raises(Refused) as refused:
        build_job("j.yaml", job)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_features_are_optional_and_only_for_images() -> None:
    """Without them the checkpoint's own tower sees the images of the samples."""
    for kind in ("align", "image_sft", "evaluate"):
        raw = {**copy.deepcopy(TRAIN), "kind": kind, kind: TRAIN["image_sft"], "inputs": {"samples": [{"uri": "a"}]}}
        if kind == "evaluate":
            raw |= {"evaluate": {"benchmark": "gqa"}, "inputs": {**raw["inputs"], "checkpoint": "c"}, "model": None}
        if kind != "image_sft":
            raw |= {"image_sft": None, "compression": None}
        job = build_job("j.yaml", {key: value for key, value in raw.items() if value is not None})
        assert job.inputs.features is None
    ask = {"name": "ask", "kind": "evaluate", "output": "o", "evaluate": {"benchmark": "gqa"}}
    both = {"samples": [{"uri": "s"}], "features": "f", "frame_cache": "c", "checkpoint": "c"}
    with pytest.raises(Refused, match="inputs: expected `features` or `frame_cache`, got both"):
        build_job("j.yaml", {**ask, "inputs": both})
    video = {**without(TRAIN, "image_sft"), "kind": "video_sft", "video_sft": TRAIN["image_sft"], "inputs": both}
    with pytest.raises(Refused, match=r"inputs\.features: not for a job of kind video_sft, which takes checkpoint, frame_cache"):
        build_job("j.yaml", without(video, "model"))


@pytest.mark.parametrize(
    ("block", "calibration", "line"),
    [
        ({"tokens": "auto", "budget": 2.0}, None, "inputs.calibration: expected an evaluation of held-out rows"),
        ({"tokens": [1]}, "c", "inputs.calibration: expected an evaluation of held-out rows"),
        ({"tokens": "auto"}, "c", "evaluate.budget: expected a number of tokens with `tokens: auto`"),
        ({"budget": 2.0}, None, "evaluate.budget: expected a number of tokens with `tokens: auto`"),
        ({"tokens": "auto", "budget": 0.5}, "c", "evaluate.budget: expected greater than or equal to 1, got 0.5"),
        ({"tokens": "atuo", "budget": 2.0}, "c", "evaluate.tokens: expected 'auto', got 'atuo'; did you mean auto?"),
        ({"tokens": [1, 0]}, None, "evaluate.tokens[1]: expected greater than or equal to 1, got 0"),
        ({"tokens": "auto", "budget": 2.0, "read_as": "none"}, "c", "evaluate.tokens: expected `read_as: own`, got none"),
    ],
)
def test_adaptive_reading_needs_a_budget_and_held_out_answers(block: dict[str, Any], calibration: str | None, line: str) -> None:
    inputs = {"samples": [{"uri": "a"}], "checkpoint": "c"} | ({"calibration": calibration} if calibration else {})
    evaluate = {"benchmark": "gqa", **block}
    with pytest.raises(Refused) as refused:
        build_job("j.yaml", {"name": "ask", "kind": "evaluate", "output": "o", "inputs": inputs, "evaluate": evaluate})
    assert line in str(refused.value)


def test_fastv_reads_no_frame_cache() -> None:
    inputs = {"samples": [{"uri": "a"}], "frame_cache": "f", "checkpoint": "c"}
    block = {"benchmark": "gqa", "read_as": "fastv", "fastv": {"layer": 2, "keep": 0.5}}
    with pytest.raises(Refused, match=r"evaluate\.read_as: fastv reads images: expected no `inputs\.frame_cache`"):
        build_job("j.yaml", {"name": "ask", "kind": "evaluate", "output": "o", "inputs": inputs, "evaluate": block})


def test_a_range_of_workers_is_kept_and_changes_no_run_id() -> None:
    raw = changed(TRAIN, "resources.workers", {"min": 2, "max": 8})
    job = build_job("job.yaml", raw)
    assert (job.resources.fewest_workers, job.resources.most_workers, job.resources.workers_text) == (2, 8, "2 to 8")
    assert build_job("job.yaml", job.model_dump(exclude_none=True)) == job  # as run.json and trials keep it
    assert compute_run_id(job, {}) == compute_run_id(build_job("job.yaml", TRAIN), {})
    fixed = build_job("job.yaml", TRAIN).resources
    assert (fixed.fewest_workers, fixed.most_workers, fixed.workers_text, fixed.is_elastic) == (2, 2, "2", False)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 6, 7, 8])
def test_workers_need_not_divide_the_batch(workers: int) -> None:
    assert build_job("job.yaml", changed(TRAIN, "resources.workers", workers)).resources.most_workers == workers
