"""The loss and its gradient do not depend on how a global batch is cut: ranks, accumulation, shared vision segments."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import world
from ranks import launch_ranks
from stored_features import write_features

from voco.train.initial_model import initial_model
from voco.train.step import learning_rate, worst_samples

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Samples (some without an image), their features and an initial model."""
    root = str(tmp_path_factory.mktemp("step"))
    world.write_samples(f"{root}/samples", world.sample_rows(16, text_every=4))
    write_features(f"{root}/features", [f"{root}/samples"])
    job = world.sft_job(f"{root}/samples", f"{root}/features", f"{root}/out")
    initial_model(job, root)
    job = job.model_copy(update={"seed": 9, "output": f"{root}/out-other"})
    initial_model(job, f"{root}/second")
    Path(f"{root}/second/initial").rename(f"{root}/other")
    return root


def step_gradients(folder, ranks, cases):
    """By case, from real DeepSpeed processes over gloo."""
    launch_ranks(HERE / "gradients.py", ranks, folder, *cases)
    return torch.load(f"{folder}/world{ranks}.pt")


@pytest.mark.slow
def test_loss_and_gradients_do_not_depend_on_the_cut(folder):
    on_one_rank = ["plain:1:share:1", "1x8:1:share:2", "accumulate:2:share:2", "alone:1:alone:2"]
    on_two_ranks = ["2x4:1:share:2", "2x4z3:1:share:3", "recomputed:2:share:3", "bf16:2:share:3"]
    results = step_gradients(folder, 1, on_one_rank) | step_gradients(folder, 2, on_two_ranks)
    reference = results["plain"]
    assert reference["loss"] > 1.0
    assert (results["1x8"]["cut"], results["2x4"]["cut"]) == (1, 1 + 2), "cut tokens are counted over all ranks"
    rounded = results.pop("bf16")
    assert abs(rounded["loss"] - reference["loss"]) < 0.01 * reference["loss"]
    gradients = [torch.cat([case["grads"][name].flatten() for name in reference["grads"]]) for case in (rounded, reference)]
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
    for name, case in results.items():
        assert abs(case["loss"] - reference["loss"]) <= 1e-6 * reference["loss"], name
        for parameter, grad in reference["grads"].items():
            error = (case["grads"][parameter] - grad).abs().max()
            scale = max(float(g.abs().max()) for g in reference["grads"].values())
            assert error <= 1e-6 * max(1.0, scale), (name, parameter, float(error))
    assert max(float(grad.abs().max()) for grad in reference["grads"].values()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["taught", "taught-other", "queries"])
def test_distillation_and_queries_do_not_depend_on_the_cut_either(folder, variant):
    results = step_gradients(folder, 1, [f"plain-{variant}:1:share:1", f"accumulated-{variant}:2:share:1"])
    results |= step_gradients(folder, 2, [f"two-{variant}:2:share:2", f"sharded-{variant}:2:share:3"])
    reference = results[f"plain-{variant}"]
    assert (reference["kl"] > 1e-3) == ("taught" in variant)
    scale = max(1.0, *(float(grad.abs().max()) for grad in reference["grads"].values()))
    for name, case in results.items():
        assert abs(case["loss"] - reference["loss"]) <= 1e-6 * reference["loss"], name
        assert abs(case["kl"] - reference["kl"]) <= 1e-6 * max(1.0, reference["kl"]), name
        for parameter, grad in reference["grads"].items():
            assert (case["grads"][parameter] - grad).abs().max() <= 1e-6 * scale, (name, parameter)


def test_the_micro_batch_with_the_largest_loss_is_named(tmp_path):
    """By token: a long one with the largest sum is not it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        batches = [SimpleNamespace(predict_id=[0] * count, sample_ids=ids) for count, ids in ((10, ("a",)), (3, ("b", "c")))]
        result = SimpleNamespace(losses=torch.tensor([20.0, 9.0]))
        assert worst_samples(result, batches) == ["b", "c"]
    finally:
        dist.destroy_process_group()


def test_learning_rate_warms_up_and_follows_a_cosine():
    rates = [learning_rate(step, 100, 1.0, 0.1, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5, abs=0.01)
    assert rates[99] == pytest.approx(0.1, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
