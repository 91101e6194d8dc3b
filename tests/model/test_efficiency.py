"""Counting gives the figures computed by hand, and what torch counts when such a model runs on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModel, DynamicCache, LlamaConfig, LlamaForCausalLM

from voco.model import efficiency
from voco.model.efficiency import SHAPES, TOWER, answer_cost, matching_lengths
from voco.model.flops import fastv_bytes, fastv_flops, image_flops, read_flops

# Counted by hand at 7B: text tokens, TFLOP without a cache, with the full one and with one <voco>, savings in %
HAND = [
    (20, 8.30, 0.27, 0.26, 96.8, 96.9), (34, 8.49, 0.45, 0.44, 94.7, 94.80), (60, 8.84, 0.80, 0.78, 91.0, 91.2),
    (114, 9.58, 1.52, 1.48, 84.1, 84.5), (256, 11.53, 3.43, 3.35, 70.3, 70.9), (512, 15.10, 6.92, 6.77, 54.2, 55.2),
]  # fmt: skip


@pytest.mark.parametrize(("text", "none", "full", "voco", "full_saves", "voco_saves"), HAND)
def test_hand_made_figures(text: int, none: float, full: float, voco: float, full_saves: float, voco_saves: float) -> None:
    cost = answer_cost(SHAPES["7B"], text, 1)
    assert [round(flops / 1e12, 2) for flops in (cost.none, cost.full, cost.voco)] == [none, full, voco]
    assert 100 * (1 - cost.full / cost.none) == pytest.approx(full_saves, abs=0.06)
    assert 100 * (1 - cost.voco / cost.none) == pytest.approx(voco_saves, abs=0.06)


def test_storage_and_compression() -> None:
    cost, two = answer_cost(SHAPES["7B"], 34, 1), answer_cost(SHAPES["7B"], 34, 2)
    assert (cost.voco_bytes, two.voco_bytes, cost.full_bytes) == (524_288, 1_048_576, 301_989_888)
    assert cost.compress / 1e12 == pytest.approx(7.73, abs=0.02)
    assert answer_cost(SHAPES["34B"], 34, 1).voco_bytes == 2 * 60 * 8 * 128 * 2  # 8 of 56 heads hold keys


def test_no_text_length_gives_all_of_the_papers_cells() -> None:
    assert matching_lengths(9.6, lambda cost: cost.none) == (113, 119)
    assert matching_lengths(1.2, lambda cost: cost.full) == (87, 93)
    assert matching_lengths(0.5, lambda cost: cost.voco) == (35, 42)
    assert (
        "1.2 TFLOP with the full cache needs 87 to 93 text tokens, 0.5 TFLOP with VoCo needs 35 to 42"
        in efficiency.efficiency_table()
    )


@pytest.mark.parametrize("name", SHAPES)
def test_torch_counts_the_same_when_it_runs(name: str) -> None:
    """Two layers of the shape, without weights: no cache, then text against cached tokens."""
    config = LlamaConfig(**{**SHAPES[name].to_dict(), "num_hidden_layers": 2, "attn_implementation": "sdpa"})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        past = DynamicCache()
        for layer in range(2):
            shape = (1, config.num_key_value_heads, 64, config.head_dim)
            past.update(torch.empty(shape), torch.empty(shape), layer)
        with FlopCounterMode(display=False) as whole:
            model(input_ids=torch.zeros(1, 610, dtype=torch.int64), logits_to_keep=1)
        with FlopCounterMode(display=False) as text:
            mask = torch.ones(1, 1, 34, 98, dtype=torch.bool)
            model(input_ids=torch.zeros(1, 34, dtype=torch.int64), attention_mask=mask, past_key_values=past, logits_to_keep=1)
    assert whole.get_total_flops() == read_flops(config, 0, 610, dense=True)
    assert text.get_total_flops() == read_flops(config, 64, 34, dense=True)


def test_torch_counts_the_same_for_the_tower_and_the_projector() -> None:
    config = SHAPES["7B"]
    used = type(TOWER)(**{**TOWER.to_dict(), "num_hidden_layers": TOWER.num_hidden_layers - 1})
    with torch.device("meta"):
        tower = CLIPVisionModel(used)
        projector = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096))
        with FlopCounterMode(display=False) as counted:
            tower(torch.zeros(1, 3, 336, 336))
            projector(torch.zeros(1, 576, 1024))
    assert counted.get_total_flops() == image_flops(config, TOWER)


def test_fastv_counts_what_its_authors_count() -> None:
    """README of pkunlp-icler/FastV, R=50 %, without the tower: 57 % of the FLOPs at 7B and K=3, 45 % less at 13B and K=2."""
    for name, layer, left in (("7B", 3, 0.57), ("13B", 2, 0.55)):
        config, tokens = SHAPES[name], 576 + 34
        assert fastv_flops(config, tokens, 288, layer, dense=True) / read_flops(config, 0, tokens, dense=True) == pytest.approx(
            left, abs=0.01
        )


@pytest.mark.parametrize("layer", [1, 3])
def test_fastv_is_layers_over_all_tokens_and_layers_over_those_that_stay(layer: int) -> None:
    """As torch counts models of one layer that really run; bytes as counted token by token."""
    config = LlamaConfig(**{**SHAPES["34B"].to_dict(), "num_hidden_layers": 1, "attn_implementation": "sdpa"})
    counted = []
    with torch.device("meta"):
        for tokens in (610, 610 - 512):
            with FlopCounterMode(display=False) as counter:
                LlamaForCausalLM(config)(input_ids=torch.zeros(1, tokens, dtype=torch.int64), logits_to_keep=1)
            counted.append(counter.get_total_flops() - 2 * config.hidden_size * config.vocab_size)
    five = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 5})
    expected = layer * counted[0] + (5 - layer) * counted[1] + 2 * config.hidden_size * config.vocab_size
    assert fastv_flops(five, 610, 512, layer, dense=True) == expected
    assert fastv_flops(five, 610, 0, layer) == read_flops(five, 0, 610)
    token_bytes = 2 * 8 * 128 * 2  # keys and values, heads, width, bf16
    assert fastv_bytes(five, 610, 512, layer, 2) == token_bytes * (layer * 610 + (5 - layer) * 98)
