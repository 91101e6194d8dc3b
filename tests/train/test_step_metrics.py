"""What is counted of a step, against the mask, torch's own counter of operations and series by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from talks import cached, caches_of, one_pass, talking_samples
from torch.utils.flop_counter import FlopCounterMode

from voco.job.config import Training
from voco.model.attention.voco_mask import pair_mask
from voco.model.flops import PEAK_TFLOPS, device_peak_tflops, training_flops
from voco.model.generation import cached_tokens
from voco.train import step_metrics
from voco.train.step_metrics import (
    StepCounter,
    StepFacts,
    attended_pairs,
    duration_text,
    forward_flops,
    ids_text,
    is_dead,
    is_spike,
    progress_text,
    rates,
    spike_limit,
    trained_share,
    voco_norm,
    warning_of,
)


@pytest.mark.parametrize("method", ["voco", "none", "avg_pool"])
@pytest.mark.parametrize("apart", [True, False])
def test_pairs_are_those_of_the_mask(method: str, apart: bool) -> None:
    model = tiny.model(method)
    samples, store, _ = talking_samples(model)
    ids = one_pass(model, samples, store).token_ids
    pairs = attended_pairs(ids, apart)
    assert pairs == int(pair_mask(ids, apart).sum())
    assert pairs != int(pair_mask(ids, not apart).sum()) or method == "avg_pool" or not apart


def test_pairs_with_caches_are_those_of_text_and_cached_tokens() -> None:
    model = tiny.model("voco")
    samples, _, by_sample = talking_samples(model)
    batch = cached(model, samples, caches_of(model, by_sample))
    sizes = [cached_tokens(cache) for cache in batch.caches]
    sample = batch.text.sample[0]
    text_only = int(pair_mask(batch.text.token_ids, True).sum())
    reads = sum(size * int((sample == index).sum()) for index, size in enumerate(sizes))
    assert attended_pairs(batch.text.token_ids, True, sizes) == text_only + reads
    assert reads > 0


@pytest.mark.parametrize("method", ["voco", "none"])
def test_operations_are_those_that_torch_counts(method: str) -> None:
    """All but attention, whose kernels torch counts as dense; every layer in full, also the last, of which a step runs less."""
    model = tiny.model(method, dtype=torch.float32)
    samples, store, _ = talking_samples(model)
    batch = one_pass(model, samples, store).to("cpu", torch.float32)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.language_model.lm_head(model.hidden(batch)[0][batch.predict_at], batch.predict_id)
    linear = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operation) and "bmm" not in str(operation)
    )
    config = model.language_model.config
    tokens, predictions = batch.ids.numel(), len(batch.predict_id)
    counted = training_flops(config, tokens, 0, predictions, len(batch.vision_at), model.feature_width)
    assert counted == linear
    with_pairs = forward_flops(model, batch) - counted
    pairs = attended_pairs(batch.token_ids, method == "voco")
    assert with_pairs == config.num_hidden_layers * 4 * config.hidden_size * pairs > 0


def test_a_step_counts_forward_and_backward_of_what_learns() -> None:
    model = tiny.model("voco")
    samples, store, _ = talking_samples(model)
    batch = one_pass(model, samples, store)
    forward = forward_flops(model, batch)
    facts = StepCounter(model).count([batch, batch], samples=5)
    assert facts == StepFacts(5, 2 * batch.ids.numel(), round(6 * forward))
    for weight in model.language_model.parameters():  # as align trains: through the language model, and none of its weights
        weight.requires_grad_(False)
    assert trained_share(model) == 0.0
    assert StepCounter(model).count([batch], samples=5).flops == round(2 * forward)


def test_facts_of_ranks_add_up_and_memory_is_the_most() -> None:
    ranks = [StepFacts(4, 100, 7_000_000_000_000, 30), StepFacts(3, 90, 5, 50), StepFacts(0, 1, 0, 20)]
    packed = [facts.packed(rank, 3) for rank, facts in enumerate(ranks)]
    assert StepFacts.unpacked(np.sum(packed, axis=0).tolist()) == StepFacts(7, 191, 7_000_000_000_005, 50)


def test_mfu_is_the_share_of_what_all_workers_could_do() -> None:
    facts = StepFacts(samples=16, tokens_read=8000, flops=4_000_000_000_000, memory_bytes=9)
    columns = rates(facts, 0.5, peak=10e12, world=2)
    assert columns == {"samples_per_s": 32, "tokens_read": 8000, "tokens_per_s": 16000, "mfu": 0.4, "memory_bytes": 9}
    assert rates(facts, 0.5, None, 2)["mfu"] is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peaks_by_the_names_that_drivers_give(name: str, tflops: float | None) -> None:
    assert device_peak_tflops(name) == tflops
    assert tflops in {*PEAK_TFLOPS.values(), 756.0, None}


def test_a_peak_that_the_job_gives_counts_before_the_devices() -> None:
    block = Training(epochs=1, global_batch=8, micro_batch=4, learning_rate=0.1)
    assert step_metrics.peak_flops(block, torch.device("cpu"), 1.5) == 1.5e12
    assert step_metrics.peak_flops(block, torch.device("cpu"), None) is None


def test_the_norm_of_voco_is_that_of_its_row() -> None:
    model = tiny.model("voco")
    table = model.language_model.model.embed_tokens.weight
    with torch.no_grad():
        table[model.layout.voco_id] = torch.tensor([3.0, 4.0] + [0.0] * 30)
    norm = voco_norm(model, zero_stage=2, step=7, cached=False)
    assert norm is not None
    assert float(norm) == 5.0
    assert voco_norm(model, zero_stage=3, step=7, cached=False) is None, "every 50 steps"
    assert voco_norm(model, zero_stage=2, step=7, cached=True) is None, "no step reads it"
    assert voco_norm(tiny.model("avg_pool"), zero_stage=2, step=7, cached=False) is None
    table.requires_grad_(False)
    assert voco_norm(model, zero_stage=2, step=7, cached=False) is None


STEADY = [2.0 + 0.01 * ((-1) ** step) * (1 + step % 5) for step in range(60)]  # median 2.0, deviations 0.01 to 0.05


def test_a_spike_is_far_above_the_median_of_the_last_steps() -> None:
    assert spike_limit(STEADY[:19]) is None
    limit = spike_limit(STEADY)
    assert limit == pytest.approx(2.0 + 6 * 0.03, abs=0.02)
    assert not is_spike(2.1, STEADY)
    assert is_spike(2.5, STEADY)
    assert not is_spike(2.5, STEADY[:19]), "too few steps to know"
    assert spike_limit([9.0] * 30 + [2.0] * 50) == pytest.approx(2.0 + 6 * 0.002), "old steps do not count"
    assert not is_spike(1.0, STEADY), "a loss that falls is none"


def row(step: int, loss: float, norm: float = 1.0, tokens: int = 5) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": norm, "tokens": tokens}


def test_a_spike_is_reported_where_it_begins() -> None:
    rows = [row(step, loss) for step, loss in enumerate(STEADY)]
    assert [warning_of(rows[: end + 1]) for end in range(len(rows))] == [""] * len(rows)
    spike = [*rows, row(60, 5.0)]
    assert warning_of(spike).startswith("loss 5.0000 stands out of the last 50 steps, whose limit is 2.")
    assert warning_of([*spike, row(61, 5.5)]) == "", "reported already"
    assert warning_of([*rows, row(60, 0.0, tokens=0)]) == "", "a step without tokens has no loss"


def test_gradients_that_are_gone_are_reported_once() -> None:
    rows = [row(step, 2.0, norm) for step, norm in enumerate([1.0, 0.5, 0.0, 1e-9, 0.0, 0.0])]
    warnings = [warning_of(rows[: end + 1]) for end in range(len(rows))]
    assert [bool(text) for text in warnings] == [False, False, False, False, True, False]
    assert "no gradient for 3 steps" in warnings[4]
    empty = [row(step, 0.0, 0.0, tokens=0) for step in range(5)]
    assert not is_dead(empty), "without a token to learn from there is no gradient"
    assert warning_of([]) == ""


def test_ids_are_cut() -> None:
    assert ids_text(["a", "b"]) == "a, b"
    assert ids_text([str(number) for number in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_the_line_has_what_is_known() -> None:
    rows = [
        {"loss": 2.0, "seconds": 2.0, "samples_per_s": 4.0, "wait": 0.5, "tokens_per_s": 1000.0, "mfu": 0.5},
        {"loss": 1.5, "seconds": 2.0, "samples_per_s": 8.0, "wait": None, "tokens_per_s": 2000.0, "mfu": 0.25,
         "grad_norm": 1.2345, "memory_bytes": 23_400_000_000},
    ]  # fmt: skip
    assert progress_text(rows, 3) == (
        "loss 1.5000, 6.0 samples/s, 1,500 tokens/s, MFU 37.5%, 12 % waiting for data, gradient norm 1.23, 23.4 GB, 6 s left"
    )
    assert progress_text([{"loss": 1.5, "seconds": 1.0}], 200) == "loss 1.5000, 0 % waiting for data, 3 min left"
    assert [duration_text(seconds) for seconds in (119, 120, 7199, 7200)] == ["119 s", "2 min", "120 min", "2.0 h"]


def test_an_attempt_counts_from_the_metrics_that_it_continues() -> None:
    from voco.train.watch import StepWatch

    watch: Any = StepWatch.__new__(StepWatch)
    for rows, attempt in (([], 0), ([{"step": 0}], 1), ([{"attempt": 0}, {"attempt": 2}], 3)):
        watch.continues(rows)
        assert watch.attempt == attempt
    result = SimpleNamespace(facts=StepFacts(8, 100, 0, 7), voco_norm=0.5)
    watch.peak, watch.world = None, 2
    assert watch.columns(result, 2.0)["attempt"] == 3
