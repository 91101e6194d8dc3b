"""Every row of the table has its method, and the model runs one that only the table knows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from torch import Tensor, nn

from voco.job.tables import METHODS, MethodRow
from voco.methods import Method, get_method
from voco.model import weights
from voco.model.batch import collate
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import VISION, Layout, build_sample


@pytest.mark.parametrize("name", METHODS)
def test_every_row_has_a_method(name: str) -> None:
    assert isinstance(get_method(name), Method)


def test_only_pooled_methods_change_features_and_they_give_n_of_them() -> None:
    for name, row in METHODS.items():
        if not row.trains:
            continue
        model = tiny.model(name, 3)
        features = torch.stack(tiny.features(2))
        pooled = model.pool(features)
        assert pooled.shape == (2, model.layout.slots, tiny.FEATURES)
        assert row.pooled or pooled is features


def test_layouts_that_a_method_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"compression\.tokens: expected a divisor of the tower's 9 positions, got 2"):
        get_method("avg_pool").check(tiny.layout("avg_pool", 2))
    with pytest.raises(ValueError, match=r"compression\.q_former_layers: expected at least 1, got 0"):
        get_method("q_former").check(tiny.layout("q_former", 2, q_former_layers=0))
    for name in ("voco", "none"):
        get_method(name).check(tiny.layout(name, 2))
    get_method("avg_pool").check(tiny.layout("avg_pool", 3))


class Scale(nn.Module):
    """One weight for every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))


def first_features(features: Tensor, layout: Layout, module: nn.Module | None) -> Tensor:
    assert isinstance(module, Scale)
    return features[:, : layout.tokens] * module.weight


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method `first` in a module of another package."""
    module = ModuleType("outside_methods")
    module.METHOD = Method(pool=first_features, module=lambda _layout, width: Scale(width))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outside_methods", module)
    for name in ("first", "projector"):
        monkeypatch.setitem(METHODS, name, MethodRow("the first features", pooled=True, module="outside_methods"))


def outside_layout(method: str = "first") -> Layout:
    return tiny.layout("none", 2).model_copy(update={"method": method})


@pytest.mark.usefixtures("outside")
def test_a_method_from_outside_is_trained_cached_and_read() -> None:
    model = VocoLlama(tiny.llama(), outside_layout(), tiny.FEATURES, tokenizer=tiny.TOKENIZER).double()
    features = tiny.features(2)
    store = {"0": features[0], "1": features[1]}
    sample = build_sample("s", [tiny.question("what is it?", "this")], list(store), tiny.TOKENIZER, model.layout)
    assert (sample.kinds == VISION).sum() == 4
    model(collate([sample], store.__getitem__, (tiny.VISION_SLOTS, tiny.FEATURES))).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if name.startswith("first.")}
    assert list(gradients) == ["first.weight"]
    assert bool((gradients["first.weight"] != 0).all())
    (cache,) = model.compress_features([features])
    assert cache.tokens == (model.layout.prefix_length,) * 2
    assert cache.key.method == "first"
    assert model.answer_ids([cache], [[5, 6]], 3)


@pytest.mark.usefixtures("outside")
def test_its_weights_are_saved_under_its_name_and_drawn_where_a_checkpoint_lacks_them(tmp_path: Path) -> None:
    model = VocoLlama(tiny.llama(torch.float32), outside_layout(), tiny.FEATURES, tokenizer=tiny.TOKENIZER)
    state = weights.own_state(model)
    weights.save_checkpoint(model, state, tmp_path / "first" / "model")
    plain = outside_layout("none")
    without = weights.load_checkpoint(str(tmp_path / "first"), plain)
    assert weights.own_state(without).keys() == state.keys() - {"first.weight"}
    weights.save_checkpoint(without, weights.own_state(without), tmp_path / "none" / "model")
    drawn = weights.load_checkpoint(str(tmp_path / "none"), model.layout, method_seed=3)
    assert weights.own_state(drawn).keys() == state.keys()
    with pytest.raises(ValueError, match=r"missing \['first\.weight'\]"):
        weights.load_checkpoint(str(tmp_path / "none"), model.layout)


@pytest.mark.usefixtures("outside")
def test_a_method_may_not_have_the_name_of_a_part_of_the_model() -> None:
    with pytest.raises(ValueError, match="method projector: a part of the model has this name"):
        VocoLlama(tiny.llama(), outside_layout("projector"), tiny.FEATURES)
