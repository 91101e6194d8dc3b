"""The trials of a sweep: names, values at their keys, bounds, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from voco.errors import Refused
from voco.job import spec
from voco.job.load import build_job, resolve_stage
from voco.job.trials import axis_product, sweep_trials, trial_name, with_values

TRAIN = {
    "name": "train", "kind": "image_sft", "compression": {"method": "voco", "tokens": 1},
    "inputs": {"samples": [{"uri": "samples"}], "features": "features", "checkpoint": "base"},
    "image_sft": {"epochs": 1, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.001},
}  # fmt: skip
ASK = {
    "name": "ask", "kind": "evaluate", "evaluate": {"benchmark": "gqa"},
    "inputs": {"samples": [{"uri": "test"}], "features": "features", "checkpoint": "@train"},
}  # fmt: skip


def sweep(axes: dict[str, list[Any]], **changes: Any) -> spec.Job:
    block = {"axes": axes, "train": copy.deepcopy(TRAIN), "evaluate": copy.deepcopy(ASK), **changes}
    return build_job("s.yaml", {"name": "sweep", "kind": "sweep", "output": "out", "seed": 7, "sweep": block})


def test_the_last_axis_is_the_fastest_and_a_block_may_be_an_axis() -> None:
    assert axis_product({"a": [1, 2], "b.c": ["x", "y"]}) == [
        {"a": 1, "b.c": "x"}, {"a": 1, "b.c": "y"}, {"a": 2, "b.c": "x"}, {"a": 2, "b.c": "y"},
    ]  # fmt: skip
    assert (
        trial_name({"compression": {"method": "avg_pool", "tokens": 4}, "image_sft.learning_rate": 0.001}) == "avg-pool-4-0-001"
    )


def test_values_are_set_at_their_keys_and_nowhere_else() -> None:
    before = copy.deepcopy(TRAIN)
    changed = with_values(TRAIN, {"compression.tokens": 4, "image_sft.learning_rate": 0.01})
    assert (changed["compression"]["tokens"], changed["image_sft"]["learning_rate"]) == (4, 0.01)
    assert before == TRAIN
    with pytest.raises(KeyError, match=r"name\.first: name is not a block"):
        with_values(TRAIN, {"name.first": 1})


def test_each_trial_is_a_job_and_is_scored_against_the_bounds_with_its_other_values() -> None:
    axes = {
        "compression": [{"method": "none", "tokens": 1}, {"method": "voco", "tokens": 2}],
        "image_sft.learning_rate": [0.001, 0.002],
    }
    trials = {item.name: item for item in sweep_trials(sweep(axes))}
    assert list(trials) == ["none-1-0-001", "none-1-0-002", "voco-2-0-001", "voco-2-0-002"]
    trial = trials["voco-2-0-002"]
    assert trial.train.output == "out/runs/voco-2-0-002/train"
    assert trial.train.seed == 7  # the sweep's
    (answers,) = trial.evaluations
    assert answers.inputs.checkpoint == trial.train.output
    assert (answers.inputs.upper, answers.inputs.lower) == ("out/runs/none-1-0-002/answers", "out/runs/none-1-0-002/lower")
    upper = trials["none-1-0-001"]
    assert [evaluation.block.read_as for evaluation in upper.evaluations] == ["own", "voco"]
    assert all(evaluation.inputs.upper is None for evaluation in upper.evaluations)


def test_without_a_trial_of_method_none_there_are_no_bounds() -> None:
    (trial,) = sweep_trials(sweep({"compression.tokens": [4]}))
    assert trial.train.compression is not None
    assert trial.train.compression.tokens == 4
    assert trial.evaluations[0].inputs.upper is None


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        ({"compression.token": [1]}, "sweep.axes: compression.token: unknown key; did you mean tokens?"),
        ({"compression.tokens": [0]}, "sweep.axes: compression.tokens: expected greater than or equal to 1, got 0"),
        ({"compression.tokens": [1, 1]}, "sweep.axes: two trials would be called 1"),
        ({"resources.workers": [9]}, "sweep.axes: resources.workers: expected at most 8 for a global_batch of 8"),
        ({"seed.x": [1]}, "sweep.axes: seed.x: seed is not a block"),
        ({"inputs.checkpoint": ["a"]}, "sweep.axes: inputs.checkpoint: expected a key of a block"),
    ],
)  # fmt: skip
def test_an_impossible_trial_is_refused_before_anything_starts(axes: dict[str, list[Any]], line: str) -> None:
    with pytest.raises(Refused, match=r"^s\.yaml: ") as error:
        sweep(axes)
    assert line in str(error.value)


def test_a_sweep_contains_a_training_job_and_its_evaluation() -> None:
    with pytest.raises(Refused, match=r'checkpoint: expected "@train"'):
        sweep({"seed": [1]}, evaluate={**ASK, "inputs": {**ASK["inputs"], "checkpoint": "other"}})  # type: ignore[dict-item]
    with pytest.raises(Refused, match=r"sweep.train.kind: expected image_sft or video_sft, got evaluate"):
        sweep({"seed": [1]}, train=ASK)


def test_a_flow_reaches_into_a_sweep_by_path() -> None:
    inner = {
        "name": "sft",
        "kind": "sweep",
        "sweep": {"axes": {"compression.tokens": [1, 2]}, "train": {**TRAIN}, "evaluate": ASK},
    }
    inner["sweep"]["train"] = {**TRAIN, "inputs": {**TRAIN["inputs"], "checkpoint": "@base"}}  # type: ignore[index, dict-item]
    base = {**TRAIN, "name": "base"}
    frames = {
        "name": "frames", "kind": "frame_cache", "frame_cache": {"fps": 1.0},
        "inputs": {"samples": [{"uri": "videos"}], "checkpoint": "@sft/runs/2/train"},
    }  # fmt: skip
    raw = {"name": "flow", "kind": "flow", "output": "out", "flow": {"stages": [base, inner, frames]}}
    job = build_job("f.yaml", raw)
    assert job.flow is not None
    outputs = {stage.name: stage.output for stage in job.flow.stages}
    real = [resolve_stage(stage, outputs) for stage in job.flow.stages]
    assert real[1].sweep is not None
    assert real[1].sweep.train.inputs.checkpoint == "out/base"
    assert real[1].sweep.evaluate.inputs.checkpoint == "@train"
    assert real[2].inputs.checkpoint == "out/sft/runs/2/train"
    wrong = copy.deepcopy(raw)
    wrong["flow"]["stages"][2]["inputs"]["checkpoint"] = "@stf/runs/2/train"  # type: ignore[index, call-overload]
    with pytest.raises(Refused, match=r"stages\[2\]\.inputs\.checkpoint: expected an earlier stage.*did you mean @sft\?"):
        build_job("f.yaml", wrong)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"kind": "align", "align": TRAIN["image_sft"], "image_sft": None}, "compression: not for a job of kind align"),
        ({"frame_cache": {"fps": 1.0, "frames": 8}}, "frame_cache: expected either `fps` or `frames`"),
        ({"kind": "frame_cache", "frame_cache": {"fps": 1.0}, "image_sft": None}, "compression: not for a job of kind"),
    ],
)  # fmt: skip
def test_impossible_combinations(changes: dict[str, Any], line: str) -> None:
    raw = {**copy.deepcopy(TRAIN), "output": "out", **changes}
    with pytest.raises(Refused) as error:
        build_job("j.yaml", {key: value for key, value in raw.items() if value is not None})
    assert line in str(error.value)


def test_an_elastic_trial_answers_at_every_n_and_uncompressed() -> None:
    elastic = {"method": "voco", "tokens": [4, 1, 2], "uncompressed_share": 0.2}
    axes = {"compression": [{"method": "none", "tokens": 4}, {"method": "voco", "tokens": 4}, elastic]}
    trials = {trial.name: trial.evaluations for trial in sweep_trials(sweep(axes))}
    assert list(trials) == ["none-4", "voco-4", "voco-4-1-2-0-2"]
    assert [(answers.block.tokens, answers.block.read_as) for answers in trials["voco-4"]] == [(None, "own")]
    answers, whole = trials["voco-4-1-2-0-2"]
    assert (answers.block.tokens, answers.block.read_as) == ([1, 2, 4], "own")
    assert (whole.block.tokens, whole.block.read_as) == (None, "none")
    assert whole.output == "out/runs/voco-4-1-2-0-2/whole"
    assert {item.inputs.upper for item in (answers, whole)} == {"out/runs/none-4/answers"}
    adaptive = {**ASK, "evaluate": {"benchmark": "gqa", "tokens": "auto", "budget": 2.0}}
    with pytest.raises(Refused, match="tokens: auto needs a threshold for each trial"):
        sweep({"compression.tokens": [2]}, evaluate={**adaptive, "inputs": {**ASK["inputs"], "calibration": "c"}})


def test_evaluated_tokens_are_for_voco_trials_and_at_most_their_n() -> None:
    both = {
        "compression": [{"method": "none", "tokens": 1}, {"method": "voco", "tokens": 4}, {"method": "avg_pool", "tokens": 4}]
    }
    at_1_and_4 = {**ASK, "evaluate": {"benchmark": "gqa", "tokens": [1, 4]}}
    tokens = {
        trial.name: [evaluation.block.tokens for evaluation in trial.evaluations]
        for trial in sweep_trials(sweep(both, evaluate=at_1_and_4))
    }
    assert tokens == {"none-1": [None, None], "voco-4": [[1, 4]], "avg-pool-4": [None]}
    with pytest.raises(Refused, match=r"tokens: expected at most each trial's N, got \[1, 4\]: trial 2 has 2"):
        sweep({"compression.tokens": [2, 4]}, evaluate=at_1_and_4)
    for read_as in ({"read_as": "voco"}, {"read_as": "fastv", "fastv": {"layer": 2, "keep": 0.5}}):
        with pytest.raises(Refused, match="a sweep reads its own bounds: expected own"):
            sweep({"compression.tokens": [2]}, evaluate={**ASK, "evaluate": {"benchmark": "gqa", **read_as}})
