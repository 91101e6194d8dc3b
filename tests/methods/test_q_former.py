"""The Q-Former baseline: its layers spelled out, gradients to every part, saved with its checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import shapes
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

from voco.job.config import Model, Text
from voco.methods.q_former import QFormer
from voco.model import build, weights
from voco.model.batch import collate
from voco.sequence.sequence import build_sample


def attended(state: dict[str, Tensor], name: str, states: Tensor, context: Tensor, heads: int) -> Tensor:
    """One attention block with its residual and norm, head by head."""

    def linear(part: str, inputs: Tensor) -> Tensor:
        return inputs @ state[f"{name}.{part}.weight"].t() + state[f"{name}.{part}.bias"]

    query, key, value = linear("attention.query", states), linear("attention.key", context), linear("attention.value", context)
    width = query.shape[-1] // heads
    out = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        out.append(scores.softmax(dim=-1) @ value[..., part])
    return normed(state, f"{name}.output.LayerNorm", linear("output.dense", torch.cat(out, dim=-1)) + states)


def normed(state: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
    centred = states - states.mean(dim=-1, keepdim=True)
    spread = (centred.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt()
    return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]


def test_it_is_self_attention_cross_attention_and_mlp_in_every_layer() -> None:
    torch.manual_seed(0)
    q_former = QFormer(queries=3, layers=2, width=96).double()
    state = dict(q_former.reader.named_parameters())
    features = torch.randn(2, 7, 96, dtype=torch.float64)
    states = normed(state, "layernorm", q_former.queries.expand(2, -1, -1))
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        states = attended(state, f"{layer}.attention", states, states, heads=2)
        states = attended(state, f"{layer}.crossattention", states, features, heads=2)
        up, down = f"{layer}.intermediate_query.dense", f"{layer}.output_query"
        inner = F.gelu(states @ state[f"{up}.weight"].t() + state[f"{up}.bias"])
        outer = inner @ state[f"{down}.dense.weight"].t() + state[f"{down}.dense.bias"]
        states = normed(state, f"{down}.LayerNorm", outer + states)
    assert tiny.close(q_former(features), states)
    assert (states[:, 0] - states[:, 1]).abs().max() > 1e-2, "different queries read different features"


@pytest.mark.parametrize("views", [2, 0])
def test_gradients_reach_every_part_with_and_without_views(views: int) -> None:
    model = tiny.model("q_former", 2)
    features = tiny.features(views)
    store = {str(number): view for number, view in enumerate(features)}
    sample = build_sample("s", [tiny.question("what is it?", "this")], list(store), tiny.TOKENIZER, model.layout)
    assert int((sample.kinds == 2).sum()) == 2 * views
    model(collate([sample], store.__getitem__, (tiny.VISION_SLOTS, tiny.FEATURES))).backward()
    assert model.method_module is not None
    for name, weight in model.method_module.named_parameters():
        assert weight.grad is not None, name  # under ZeRO a rank without a gradient would wait forever
        # a key's bias moves all scores of a query alike
        assert bool(weight.grad.abs().max() > 0) == (views > 0) or name.endswith("key.bias"), name


def test_saved_drawn_from_a_seed_and_left_out_under_another_method(tmp_path: Path) -> None:
    block = Model.model_validate(shapes.MODEL)
    created = build.create_model(
        block, "q_former", 2, Text(template="question_answer"), ["red", "green"], seed=1, q_former_layers=3
    )
    weights.save_checkpoint(created, weights.own_state(created), tmp_path / "a" / "model")
    loaded = weights.load_checkpoint(str(tmp_path / "a"))
    before, after = weights.own_state(created), weights.own_state(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    features = torch.randn(1, *created.tower.shape)  # type: ignore[union-attr]
    assert torch.equal(created.pool(features), loaded.pool(features))
    plain = loaded.layout.model_copy(update={"method": "none", "q_former_layers": 0})
    without = weights.load_checkpoint(str(tmp_path / "a"), plain)
    assert not any(name.startswith("q_former.") for name in weights.own_state(without))
    weights.save_checkpoint(without, weights.own_state(without), tmp_path / "b" / "model")
    with pytest.raises(ValueError, match=r"missing \['q_former"):
        weights.load_checkpoint(str(tmp_path / "b"), loaded.layout)
    again = [
        weights.own_state(weights.load_checkpoint(str(tmp_path / "b"), loaded.layout, method_seed=seed)) for seed in (5, 5, 6)
    ]
    assert all(torch.equal(again[0][name], again[1][name]) for name in again[0])
    assert not torch.equal(again[0]["q_former.queries"], again[2]["q_former.queries"])
