"""Saves and loads a checkpoint's `model/`: `model.safetensors`, tokenizer, `preprocessor_config.json` and `config.json`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from voco.image.rgb import RGB_RULE
from voco.model.adapter import base_name
from voco.model.checkpoint_layout import CONFIG_FILE, WEIGHTS_FILE, compressor_uri, config_uri, model_uri, own_compressor
from voco.model.fingerprint import WeightHash, hash_tensors
from voco.model.interop.preprocessing import PREPROCESSOR
from voco.model.vision.tower import empty_tower
from voco.model.voco_llama import VocoLlama
from voco.model.weight_reader import WeightReader
from voco.model.weight_writer import write_weights
from voco.sequence.sequence import Layout
from voco.store import storage

FORMAT = 1
EMBEDDING, HEAD, TOWER = "language_model.model.embed_tokens.weight", "language_model.lm_head.", "tower."
MakeParameter = Callable[[WeightReader, str, torch.dtype], nn.Parameter]  # of a weight by its name, in a number type


def compressor_hash(state: dict[str, Tensor]) -> str:
    """The hash of the weights that make caches: all but the output head, which caches do not depend on."""
    return hash_tensors((name, tensor) for name, tensor in state.items() if not name.startswith(HEAD))


def own_state(model: VocoLlama) -> dict[str, Tensor]:
    """Weights by name, each tensor once: a tied output head is left out, because it is the embedding table.

    Under an adapter these are the base weights, by the names that they have without it.
    """
    named = {base_name(name): tensor for name, tensor in model.state_dict().items()}
    state = {name: tensor for name, tensor in named.items() if name is not None and not name.endswith("inv_freq")}
    if model.language_model.config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    return state


def save_checkpoint(
    model: VocoLlama,
    state: dict[str, Tensor],
    folder: Path,
    keep_compressor: bool = False,
    read: Callable[[str], Tensor] | None = None,
) -> str:
    """Write `state` (names as in `own_state`) with the model's configuration, and return the compressor's hash.

    The state is an argument because training gathers it from shards. With `read` its tensors say only number type and shape:
    `read` gives the values of each name, once, in the order of `file_order`, and no two of them have to be in memory together.
    With `keep_compressor` the checkpoint reads the caches of the compressor that the model was loaded with; else it is its own
    compressor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = WeightHash()

    def hash_weight(name: str, tensor: Tensor) -> None:
        if not keep_compressor and not name.startswith(HEAD):
            digest.add(name, tensor)

    with (folder / WEIGHTS_FILE).open("wb") as file:
        write_weights(file, tensor_kinds(state), read or state.__getitem__, hash_weight)
    compressor = model.compressor if keep_compressor else digest.hexdigest()
    tower = model.tower
    language_model = {**model.language_model.config.to_dict(), "dtype": str(state[EMBEDDING].dtype).removeprefix("torch.")}
    config = {
        "format": FORMAT,
        "compressor": compressor,
        "compressor_tokens": model.compressor_tokens if keep_compressor else model.layout.tokens,
        "layout": model.layout.model_dump(),
        "feature_width": model.feature_width,
        "language_model": language_model,
        "tower": tower.config if tower is not None else None,
        "net": tower.net_config if tower is not None else None,
        "preprocessing": model.preprocessing,
    }
    keep_legacy(model.tokenizer)
    model.tokenizer.save_pretrained(folder)
    if tower is not None:
        (folder / PREPROCESSOR).write_text(json.dumps(tower.preprocessing, indent=1) + "\n")
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return compressor


def tensor_kinds(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Number type and shape of tensors, by name."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def keep_legacy(tokenizer: Any) -> None:
    """Have a tokenizer's files say how it treats text after a control token: transformers 5.23 leaves `legacy: true` out."""
    if getattr(tokenizer, "legacy", None) is not None:
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy


def read_config(checkpoint: str) -> dict[str, Any]:
    """`model/config.json` of a checkpoint directory, at a local path or `s3://`."""
    config: dict[str, Any] = storage.read_json(config_uri(checkpoint))
    return config


def read_tokenizer(checkpoint: str) -> Any:
    """A checkpoint's tokenizer, without its weights."""
    uri = model_uri(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.list_names(uri):
            if name.startswith(("tokenizer", "special_tokens")):
                (Path(folder) / name).write_bytes(storage.read_bytes(storage.join(uri, name)))
        return AutoTokenizer.from_pretrained(folder)


def load_compressor(checkpoint: str, device: str = "cpu") -> VocoLlama:
    """The model that makes the caches which a checkpoint reads: the frozen one that it was trained with, or itself."""
    uri = compressor_uri(checkpoint) if own_compressor(checkpoint) else checkpoint
    return load_checkpoint(uri, device=device)


def load_checkpoint(
    checkpoint: str,
    layout: Layout | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "segments",
    device: str | torch.device = "cpu",
    method_seed: int | None = None,
    *,
    with_tower: bool = True,
    folder: Path | None = None,
    make_parameter: MakeParameter | None = None,
) -> VocoLlama:
    """The model of a checkpoint directory. `layout` replaces the stored one; `dtype` None keeps the stored number type.

    Under another method than the stored one, the stored method's own weights are left out. Where the checkpoint lacks those of
    `layout`'s method, they are drawn with `method_seed`; None: they are missing.

    Memory: on the CPU a weight that keeps its number type is the file's pages, which all processes of a machine share; others
    are converted one by one. `folder` is a local copy of the checkpoint's `model/`; `make_parameter` makes each parameter but
    the tower's, such as a shard of it; without `with_tower` the tower is not read.

    Raises ValueError for weights that do not fit, and for an attention backend that cannot honour the mask.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or storage.get_directory(model_uri(checkpoint), Path(temporary) / "model")
        model, stored = _build_empty(folder, layout, attention, method_seed, with_tower)
        reader = WeightReader(str(folder / WEIGHTS_FILE))
        names = _loaded_names(checkpoint, reader, model, stored, drawn=method_seed is not None)
        number = dtype or reader.tensors[EMBEDDING].dtype
        if model.method_module is not None:
            model.method_module.to(number)  # those that were drawn
        make = make_parameter or parameter_on(device)
        for name in names:
            if not name.startswith(TOWER):
                _set_weight(model, reader, name, number, make)
        if model.tower is not None:
            _load_tower(model, reader, parameter_on(device), stored)
    language_model = model.language_model
    if language_model.config.tie_word_embeddings:
        language_model.lm_head.weight = language_model.model.embed_tokens.weight
    return model.to(device).eval()


def parameter_on(device: str | torch.device) -> MakeParameter:
    """Complete weights on a device. On the CPU those of an unchanged number type map the file."""

    def make(reader: WeightReader, name: str, dtype: torch.dtype) -> nn.Parameter:
        if reader.tensors[name].dtype == dtype:
            return nn.Parameter(reader.mapped(name).to(device))
        return nn.Parameter(reader.read(name, dtype).to(device))

    return make


class StoredWeights:
    """What `load_checkpoint` and `own_state` give for a checkpoint, with one weight in memory at a time.

    `model` has tokenizer, tower and configuration, and weights that say their shapes only. `state` says the number type and
    shape of each weight, and `read` gives its values from ranges of the file, at a local path or `s3://`.
    """

    def __init__(self, checkpoint: str, layout: Layout, method_seed: int | None = None) -> None:
        uri = model_uri(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            for name in storage.list_names(uri):
                if name != WEIGHTS_FILE:
                    (Path(folder) / name).write_bytes(storage.read_bytes(storage.join(uri, name)))
            self.model, config = _build_empty(Path(folder), layout, "segments", method_seed, True)
        self._reader = WeightReader(storage.join(uri, WEIGHTS_FILE))
        self._names = set(_loaded_names(checkpoint, self._reader, self.model, config, drawn=method_seed is not None))
        if not config["current_rgb"]:
            _load_tower(self.model, self._reader, parameter_on("cpu"), config)
        self._weights = own_state(self.model)
        number = self._reader.tensors[EMBEDDING].dtype
        self.state = {
            name: torch.empty_like(tensor, dtype=_loaded_dtype(name, tensor.dtype, number), device="meta")
            for name, tensor in self._weights.items()
        }

    def read(self, name: str) -> Tensor:
        """A weight in memory that belongs to it alone: of the file, or drawn for a method whose weights the file lacks."""
        dtype = self.state[name].dtype
        return self._reader.read(name, dtype) if name in self._names else self._weights[name].detach().to(dtype)


def _build_empty(
    folder: Path, layout: Layout | None, attention: str, method_seed: int | None, with_tower: bool
) -> tuple[VocoLlama, dict[str, Any]]:
    """The model of a local `model/` with weights that take no memory, and its configuration."""
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    preprocessing = json.loads((folder / PREPROCESSOR).read_text()) if (folder / PREPROCESSOR).is_file() else None
    config["current_rgb"] = preprocessing is None or preprocessing.get("rgb") == RGB_RULE
    facts = dict(config["language_model"])
    lm_config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(lm_config)
    rotary = language_model.model.rotary_emb
    language_model.model.rotary_emb = type(rotary)(lm_config)  # its frequencies are in no file
    with_tower = config["tower"] is not None and (with_tower or not config["current_rgb"])
    with torch.random.fork_rng(devices=[]):
        tower = empty_tower(config["tower"], config["net"], preprocessing) if with_tower else None
        torch.manual_seed(method_seed or 0)
        read_as = layout or Layout(**config["layout"])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = VocoLlama(language_model, read_as, config["feature_width"], tower, tokenizer, attention)
    model.compressor, model.compressor_tokens = config["compressor"], config["compressor_tokens"]
    model.preprocessing = config["preprocessing"]
    return model, config


def _loaded_names(checkpoint: str, reader: WeightReader, model: VocoLlama, config: dict[str, Any], drawn: bool) -> list[str]:
    """The names of the file that the model takes, in the file's order: not those of the stored method if it has another one.

    Raises ValueError for names that are missing (`drawn`: but for the method's) or too many, and for other shapes.
    """
    method, stored_method = model.layout.method, config["layout"]["method"]
    left_out: tuple[str, ...] = () if stored_method == method else (f"{stored_method}.",)
    if model.tower is None:
        left_out += (TOWER,)
    names = [name for name in reader.tensors if not name.startswith(left_out)]
    state = own_state(model)
    expected = set(state)
    if drawn and not any(name.startswith(f"{method}.") for name in names):
        expected = {name for name in state if not name.startswith(f"{method}.")}
    if expected != set(names):
        missing, unexpected = sorted(expected - set(names)), sorted(set(names) - expected)
        raise ValueError(f"{checkpoint}: weights do not fit: missing {missing}, unexpected {unexpected}")
    shapes = {name: (reader.tensors[name].shape, tuple(state[name].shape)) for name in names}
    wrong = [f"{name} of {got}, expected {shape}" for name, (got, shape) in shapes.items() if got != shape]
    if wrong:
        raise ValueError(f"{checkpoint}: weights do not fit: {'; '.join(wrong)}")
    return names


def _load_tower(model: VocoLlama, reader: WeightReader, make: MakeParameter, config: dict[str, Any]) -> None:
    assert model.tower is not None
    for name in reader.tensors:
        if name.startswith(TOWER):
            _set_weight(model, reader, name, torch.float32, make)
    model.tower.use_channels_last()
    if not config["current_rgb"]:  # of a version that made other pixels of some images: nothing of it is reused
        model.preprocessing = model.tower.identity


def _set_weight(model: VocoLlama, reader: WeightReader, name: str, number: torch.dtype, make: MakeParameter) -> None:
    """Give the model a weight of the file, in the type `number` where the file has floating point."""
    owner, _, leaf = name.rpartition(".")
    module, dtype = model.get_submodule(owner), _loaded_dtype(name, reader.tensors[name].dtype, number)
    if leaf in module._parameters:
        before = module._parameters[leaf]
        setattr(module, leaf, make(reader, name, dtype).requires_grad_(before is not None and before.requires_grad))
    else:
        module._buffers[leaf] = reader.read(name, dtype)


def _loaded_dtype(name: str, stored: torch.dtype, number: torch.dtype) -> torch.dtype:
    """The type of a loaded weight: the tower's are fp32, so that features do not depend on the machine."""
    if not stored.is_floating_point:
        return stored
    return torch.float32 if name.startswith(TOWER) else number


def copy_compressor(start: str, output: str) -> None:
    """Copy the compressor of the checkpoint `start` to `<output>/compressor`, for a model that was trained on its caches."""
    source = compressor_uri(start) if own_compressor(start) else start
    with tempfile.TemporaryDirectory() as temporary:
        folder = storage.get_directory(model_uri(source), Path(temporary) / "model")
        storage.put_directory(folder, model_uri(compressor_uri(output)))
