"""Files of weights are written and read tensor by tensor, with the bytes of safetensors' own functions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import shapes
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from voco.job.config import Model, Text
from voco.model import build, weights
from voco.model.weight_reader import NUMBERS, PIECE_BYTES, WeightReader
from voco.model.weight_writer import file_order, write_weights
from voco.sequence.sequence import Layout


def tensors() -> dict[str, Tensor]:
    """Two tensors of every number type, whose names are not in the file's order, a number alone and one of no element."""
    generator = torch.Generator().manual_seed(0)
    named = {}
    for name, dtype in NUMBERS.items():
        for first in ("b", "a"):
            named[f"{first}.{name}.é"] = (10 * torch.randn(3, 5, generator=generator)).to(dtype)
    return {**named, "alone": torch.tensor(3.0), "empty": torch.zeros(0, 3)}


def test_written_tensor_by_tensor_the_file_has_the_bytes_of_safetensors() -> None:
    named, taken = tensors(), list[str]()
    hashed: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        taken.append(name)
        return named[name]

    file = io.BytesIO()
    kinds = weights.tensor_kinds(named)
    write_weights(file, kinds, read, hashed.__setitem__)
    assert file.getvalue() == save(named)
    assert taken == list(hashed) == file_order(kinds)
    assert sorted(taken) == sorted(named)


def test_a_tensor_of_another_kind_is_not_written() -> None:
    kinds = {"a": (torch.float32, (2, 3))}
    for tensor in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="a: expected"):
            write_weights(io.BytesIO(), kinds, lambda _name, tensor=tensor: tensor)


def test_slices_complete_tensors_and_mapped_ones_are_equal(tmp_path: Path) -> None:
    named = {**tensors(), "long": torch.arange(PIECE_BYTES // 4 + 7, dtype=torch.int32)}
    save_file(named, tmp_path / "w.safetensors", metadata={"format": "pt"})
    reader = WeightReader(str(tmp_path / "w.safetensors"))
    assert list(reader.tensors) == file_order(weights.tensor_kinds(named))
    for name, tensor in named.items():
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.mapped(name), tensor)
        assert reader.tensors[name].shape == tensor.shape
        start, stop = tensor.numel() // 3, tensor.numel()
        assert torch.equal(reader.read_slice(name, start, stop), tensor.flatten()[start:stop])
        halved = reader.read_slice(name, start, stop, torch.bfloat16)
        assert torch.equal(halved, tensor.flatten()[start:stop].to(torch.bfloat16))


def test_writing_to_a_mapped_tensor_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "w.safetensors")
    WeightReader(str(tmp_path / "w.safetensors")).mapped("a").zero_()
    assert float(load_file(tmp_path / "w.safetensors")["a"].sum()) == 1000


def test_files_that_are_cut_are_refused(tmp_path: Path) -> None:
    data = save({"a": torch.ones(1000), "b": torch.ones(10)})
    for size, message in ((0, "no complete"), (20, "no complete"), (len(data) - 4, "cut inside b")):
        (tmp_path / "w.safetensors").write_bytes(data[:size])
        with pytest.raises(ValueError, match=message):
            WeightReader(str(tmp_path / "w.safetensors")).read("b")
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ValueError, match="F4"):
        WeightReader(str(tmp_path / "w.safetensors"))


def create(method: str, **tower: object) -> tuple[object, Layout]:
    block = Model.model_validate({"llama": shapes.LLAMA, "tower": shapes.tower(**tower)})
    model = build.create_model(block, method, 2, Text(template="question_answer"), ["red", "green"], seed=1, q_former_layers=2)
    return model, model.layout


@pytest.mark.parametrize("number", [None, torch.bfloat16])
@pytest.mark.parametrize("change", [{}, {"method": "none", "tokens": 0}, {"method": "q_former", "q_former_layers": 2}])
def test_stored_weights_are_those_that_a_loaded_model_has(tmp_path: Path, change: dict[str, object], number: torch.dtype) -> None:
    """Also under another method, whose weights are drawn, and where trained weights have another number type than others."""
    model, layout = create("voco")
    state = weights.own_state(model)
    state = {
        name: tensor.to(number) if number and name.startswith("language_model.") else tensor for name, tensor in state.items()
    }
    weights.save_checkpoint(model, state, tmp_path / "model")
    layout = layout.model_copy(update=change)
    stored = weights.StoredWeights(str(tmp_path), layout, method_seed=3)
    loaded = weights.load_checkpoint(str(tmp_path), layout, method_seed=3)
    expected = weights.own_state(loaded)
    assert weights.tensor_kinds(stored.state) == weights.tensor_kinds(expected)
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in expected.items())
    folders = [tmp_path / name for name in ("a", "b")]
    hashes = {
        weights.save_checkpoint(loaded, expected, folders[0]),
        weights.save_checkpoint(stored.model, stored.state, folders[1], read=stored.read),
    }
    assert hashes == {weights.compressor_hash(expected)}
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert files[0]["model.safetensors"] == save({name: tensor.contiguous() for name, tensor in expected.items()})


def test_a_model_without_its_tower_has_all_other_weights(tmp_path: Path) -> None:
    model, _ = create("voco")
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "model")
    complete, without = (weights.load_checkpoint(str(tmp_path), with_tower=with_tower) for with_tower in (True, False))
    assert without.tower is None
    assert without.cache_key() == complete.cache_key()
    expected = {name: tensor for name, tensor in weights.own_state(complete).items() if not name.startswith("tower.")}
    state = weights.own_state(without)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    model, _ = create("voco")
    state = weights.own_state(model)
    state["projector.0.bias"] = torch.zeros(3)
    weights.save_checkpoint(model, state, tmp_path / "model")
    with pytest.raises(ValueError, match=r"projector.0.bias of \(3,\), expected \(32,\)"):
        weights.load_checkpoint(str(tmp_path))


def test_loading_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    model, _ = create("voco")
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "model")
    before = torch.get_rng_state()
    weights.load_checkpoint(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
