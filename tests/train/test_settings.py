"""Settings of a GPU, offloading, compiled layers and token budgets change how a step is computed, not what it computes.

They run here on CPUs: DeepSpeed takes the same code paths, without streams.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train.test_state_shards import folder, launch, outcome  # noqa: F401 - folder is a fixture

STEPS = 3


def case(name: str, stage: int, **settings: Any) -> dict[str, Any]:
    return {"name": name, "stage": stage, "steps": STEPS, **settings}


def trained(folder: Path, name: str, ranks: int) -> dict[str, torch.Tensor]:  # noqa: F811
    return load_file(folder / name / f"last-{ranks}.safetensors")


def check_equal(folder: Path, names: list[str], reference: str, ranks: int) -> None:  # noqa: F811
    expected, weights = outcome(folder, reference, ranks)["metrics"], trained(folder, reference, ranks)
    assert len(expected) == STEPS
    before = load_file(folder / reference / f"first-{ranks}.safetensors")
    assert max(float((weights[name] - before[name]).abs().max()) for name in weights) > 1e-3, "it trains"
    for name in names:
        for row, other in zip(expected, outcome(folder, name, ranks)["metrics"], strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-6), (name, row["step"])
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4), (name, row["step"])
            assert (other["tokens"], other["sample_ids_sha256"]) == (row["tokens"], row["sample_ids_sha256"])
        for key, value in trained(folder, name, ranks).items():
            assert float((value - weights[key]).abs().max()) <= 1e-5, (name, key)


@pytest.mark.slow
def test_settings_of_gpus_train_the_same(folder: Path) -> None:  # noqa: F811
    cases = [case("cpu", 2), *(case(f"gpu{stage}", stage, gpu=True) for stage in (1, 2, 3))]
    launch(folder, 2, cases)
    check_equal(folder, [item["name"] for item in cases[1:]], "cpu", 2)


@pytest.mark.slow
def test_offloaded_states_and_weights_train_the_same(folder: Path) -> None:  # noqa: F811
    states, weights = {"offload": "optimizer"}, {"offload": "parameters"}
    cases = [case("whole", 2), *(case(f"states{stage}", stage, changes=states) for stage in (1, 2, 3))]
    cases += [case("weights3", 3, changes=weights), case("gpu-states3", 3, changes=states, gpu=True)]
    launch(folder, 2, cases)
    check_equal(folder, [item["name"] for item in cases[1:]], "whole", 2)


@pytest.mark.slow
def test_token_budgets_train_the_same(folder: Path) -> None:  # noqa: F811
    """Ranks have different numbers of micro-batches, which differ from step to step; the rank with fewer repeats a filler."""
    cases = [case("samples", 2)]
    for stage in (1, 2, 3):
        for tokens in (120, 400):
            changes = {"micro_batch": None, "micro_tokens": tokens}
            cases.append(case(f"tokens{stage}-{tokens}", stage, changes=changes))
    cases.append(case("tokens-states", 2, changes={"micro_batch": None, "micro_tokens": 120, "offload": "optimizer"}))
    launch(folder, 2, cases)
    check_equal(folder, [item["name"] for item in cases[1:]], "samples", 2)


@pytest.mark.slow
def test_compiled_layers_train_the_same(folder: Path) -> None:  # noqa: F811
    cases = [case("eager", 2), case("compiled", 2, changes={"compile": True})]
    launch(folder, 2, cases)
    check_equal(folder, ["compiled"], "eager", 2)


@pytest.mark.slow
def test_bf16_on_gpus_stays_close_to_cpus(folder: Path) -> None:  # noqa: F811
    """The GPU's sums of micro-batches are in fp32, and its messages in bf16 like the CPU's."""
    both = [(kind, stage) for kind in ("cpu", "gpu") for stage in (2, 3)]
    cases = [case(f"{kind}-bf16-{stage}", stage, precision="bf16", gpu=kind == "gpu") for kind, stage in both]
    launch(folder, 2, cases)
    for stage in (2, 3):
        on_cpu, on_gpu = (outcome(folder, f"{kind}-bf16-{stage}", 2)["metrics"] for kind in ("cpu", "gpu"))
        for row, other in zip(on_cpu, on_gpu, strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=0.01)
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=0.03)
