"""An adapter of peft beside the frozen language model: what it trains, its merge, its files, and the base when it is off."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from talks import one_pass, talking_samples

from voco.commands.estimate import trained_parameters
from voco.commands.shapes import ModelShape, TowerShape
from voco.job.config import ImageSft, Lora, VideoSft
from voco.model import adapter, weights

TRAINING = {"epochs": 1, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.1}
KINDS = [
    Lora(rank=4),
    Lora(rank=3, alpha=5.0, targets="attention", dora=True),
    Lora(rank=2, targets=["v_proj", "down_proj"]),
    Lora(rank=4, dora=True),
]
NAMES = ["lora", "dora-attention", "two-layers", "dora"]


def adapted(lora: Lora, learns_voco: bool = True, seed: int = 3, **changes: Any) -> Any:
    """A tiny model whose adapter is not zero any more, as after training."""
    model = tiny.model(**changes)
    adapter.attach(model, lora, seed=7, learns_voco=learns_voco)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if adapter.is_adapter(name):
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.add_((0.3 * noise).to(weight.dtype))
    return model


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if adapter.is_adapter(name)}


def merged_model(model: Any, lora: Lora, **changes: Any) -> Any:
    """The tiny base with the adapter of `model` merged into its weights."""
    base = tiny.model(**changes)
    state, trained, voco_id = weights.own_state(base), trained_weights(model), model.layout.voco_id
    merged = {name: adapter.merged(name, weight, trained, lora, voco_id) for name, weight in state.items()}
    assert {name for name in state if not torch.equal(state[name], merged[name])} == adapter.merged_names(trained)
    base.load_state_dict(merged, strict=False)
    return base


@contextmanager
def switched_off(model: Any) -> Any:
    """The adapter off, by peft's own switch, and the base's row of <voco>."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    row, model.voco_embedding = model.voco_embedding, None
    for layer in layers:
        layer.enable_adapters(False)
    yield
    for layer in layers:
        layer.enable_adapters(True)
    model.voco_embedding = row


@pytest.mark.parametrize("lora", KINDS, ids=NAMES)
def test_attached_it_changes_no_number_and_no_name_and_freezes_the_rest(lora: Lora) -> None:
    base, model = tiny.model(), tiny.model()
    samples, store, _ = talking_samples(base)
    batch = one_pass(base, samples, store)
    adapter.attach(model, lora, seed=7, learns_voco=True)
    assert tiny.close(model.logits(batch), base.logits(batch))
    before, after = weights.own_state(base), weights.own_state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model(batch).backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0}
    free = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert free == {name for name in free if adapter.is_adapter(name) or name.startswith("projector.")}
    assert free - moved == {name for name in free if adapter.FACTOR_A in name}, "with B zero, A has no gradient yet"
    assert adapter.VOCO_ROW in moved
    layers = {name.split(".")[-4] for name in free if adapter.FACTOR_A in name}
    assert layers == set(lora.layers)
    assert sum(adapter.MAGNITUDE in name for name in free) == lora.dora * 3 * len(lora.layers)


def test_the_factors_are_a_function_of_the_seed() -> None:
    states = []
    for seed in (7, 7, 8):
        torch.manual_seed(len(states))  # the global state does not matter, and is left as it is
        model = tiny.model()
        before = torch.random.get_rng_state()
        adapter.attach(model, KINDS[0], seed=seed, learns_voco=True)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(trained_weights(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("lora", KINDS, ids=NAMES)
def test_merged_it_gives_the_same_logits(lora: Lora, dtype: torch.dtype) -> None:
    model = adapted(lora, dtype=dtype)
    samples, store, _ = talking_samples(model)
    batch = one_pass(model, samples, store).to("cpu", dtype)
    assert tiny.close(merged_model(model, lora, dtype=dtype).logits(batch), model.logits(batch))
    assert (tiny.model(dtype=dtype).logits(batch) - model.logits(batch)).abs().max() > 1e-2, "the adapter moves them"
    with torch.no_grad():
        model.voco_embedding.zero_()
    assert not tiny.close(merged_model(adapted(lora, dtype=dtype), lora, dtype=dtype).logits(batch), model.logits(batch))


def test_a_tied_head_keeps_its_row_of_voco_until_the_merge() -> None:
    """While it trains, only the embedding of <voco> moves; merged, the tied head's row moves too. No answer contains <voco>."""
    lora, changes = KINDS[0], {"tie_word_embeddings": True}
    model = adapted(lora, **changes)
    samples, store, _ = talking_samples(model)
    batch = one_pass(model, samples, store)
    voco, tied = model.layout.voco_id, merged_model(model, lora, **changes)
    others = [token for token in range(model.language_model.config.vocab_size) if token != voco]
    assert tiny.close(tied.logits(batch)[..., others], model.logits(batch)[..., others])
    assert not tiny.close(tied.logits(batch)[..., voco], model.logits(batch)[..., voco])


@pytest.mark.parametrize("lora", KINDS, ids=NAMES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_its_files_are_those_of_peft(lora: Lora, tied: bool, tmp_path: Path) -> None:
    """Names, shapes and configuration are what peft itself writes; peft reads ours and gives the merged model's logits."""
    from peft import PeftModel, get_peft_model

    changes = {"dtype": torch.float64, "tie_word_embeddings": tied}  # in fp32 the order of sums alone moves logits by 1.2e-5
    model = adapted(lora, **changes)
    voco = model.layout.voco_id
    adapter.save_adapter(trained_weights(model), lora, voco, "the-base", tmp_path / "ours")
    bare = {"seed": 0, **changes}
    by_peft = get_peft_model(tiny.llama(**bare), adapter.peft_config(lora, voco))
    by_peft.save_pretrained(str(tmp_path / "theirs"))
    files = [load_file(tmp_path / name / adapter.PEFT_WEIGHTS) for name in ("ours", "theirs")]
    assert {name: tensor.shape for name, tensor in files[0].items()} == {name: tensor.shape for name, tensor in files[1].items()}
    written, expected = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    changed = {key for key in expected if written[key] != expected[key]}
    assert changed <= {"target_modules", "auto_mapping", "base_model_name_or_path"}, "a set, and what it takes from the model"
    assert written["base_model_name_or_path"] == "the-base"
    assert set(written["target_modules"]) == set(expected["target_modules"])

    loaded = PeftModel.from_pretrained(tiny.llama(**bare), str(tmp_path / "ours"))
    ids = torch.tensor([[voco, *range(5, 40), voco, 77, voco]])
    plain = merged_model(model, lora, **changes).language_model
    merged = tiny.llama(**bare)
    merged.load_state_dict(plain.state_dict(), strict=False)
    assert tiny.close(loaded(ids).logits, merged(ids).logits)
    assert (tiny.llama(**bare)(ids).logits - merged(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("lora", KINDS, ids=NAMES)
def test_switched_off_it_compresses_as_its_base_bit_by_bit(lora: Lora) -> None:
    """The compressor of a video model is its base: the same caches, of which one that is trained makes others."""
    base, model = tiny.model(dtype=torch.float32), adapted(lora, learns_voco=False, dtype=torch.float32)
    views = [tiny.features(2, dtype=torch.float32), tiny.features(1, seed=4, dtype=torch.float32)]
    expected, changed = base.compress_features(views), model.compress_features(views)
    with switched_off(model):
        caches = model.compress_features(views)
    for cache, like, other in zip(caches, expected, changed, strict=True):
        assert torch.equal(cache.keys, like.keys)
        assert torch.equal(cache.values, like.values)
        assert not torch.equal(other.values, like.values)
    assert [cache.key for cache in caches] == [cache.key for cache in expected]


def test_a_bf16_base_keeps_its_type_and_the_sum_is_made_in_fp32() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    prefix = "language_model.model.layers.0.self_attn.q_proj."
    a, b = torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16), torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16)
    trained = {f"{prefix}{adapter.FACTOR_A}": a, f"{prefix}{adapter.FACTOR_B}": b}
    merged = adapter.merged(f"{prefix}weight", weight, trained, Lora(rank=1, alpha=3.0), voco_id=0)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged.float(), torch.tensor([[2.5, 0.5], [3.75, 3.25]]))
    trained[f"{prefix}{adapter.MAGNITUDE}"] = torch.tensor([26.0, 4.0], dtype=torch.bfloat16)
    dora = Lora(rank=1, alpha=3.0, dora=True)
    lengths = adapter.merged(f"{prefix}weight", weight, trained, dora, voco_id=0).float().norm(dim=1)
    assert torch.allclose(lengths, torch.tensor([26.0, 4.0]), rtol=2**-8)
    other = torch.ones(2, 2)
    assert adapter.merged("projector.0.weight", other, trained, Lora(rank=1), voco_id=0) is other


@pytest.mark.parametrize("lora", KINDS, ids=NAMES)
def test_plan_counts_its_weights(lora: Lora) -> None:
    for learns_voco, block in ((True, ImageSft), (False, VideoSft)):
        model = adapted(lora, learns_voco=learns_voco)
        shape = ModelShape(model.language_model.config, TowerShape(9, 6, 0.0, 0), "voco", 2)
        counted = sum(weight.numel() for weight in trained_weights(model).values())
        assert trained_parameters(shape, block(**TRAINING, lora=lora)) == counted
