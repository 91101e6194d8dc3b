"""Saves and loads a checkpoint's `model/`: `model.safetensors`, tokenizer, `preprocessor_config.json` and `config.json`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from voco.image.rgb import RGB_RULE
from voco.model.checkpoint_layout import CONFIG_FILE, WEIGHTS_FILE, compressor_uri, config_uri, model_uri, own_compressor
from voco.model.fingerprint import hash_tensors
from voco.model.interop.preprocessing import PREPROCESSOR
from voco.model.vision.tower import empty_tower
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import Layout
from voco.store import storage

FORMAT = 1


def compressor_hash(state: dict[str, Tensor]) -> str:
    """The hash of the weights that make caches: all but the output head, which caches do not depend on."""
    return hash_tensors((name, tensor) for name, tensor in state.items() if not name.startswith("language_model.lm_head."))


def own_state(model: VocoLlama) -> dict[str, Tensor]:
    """Weights by name, each tensor once: a tied output head is left out, because it is the embedding table."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("inv_freq")}
    if model.language_model.config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    return state


def save_checkpoint(model: VocoLlama, state: dict[str, Tensor], folder: Path, keep_compressor: bool = False) -> str:
    """Write `state` (names as in `own_state`) with the model's configuration, and return the compressor's hash.

    The state is an argument because training gathers it from shards. With `keep_compressor` the checkpoint reads the caches of
    the compressor that the model was loaded with; else it is its own compressor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    compressor = model.compressor if keep_compressor else compressor_hash(tensors)
    tower = model.tower
    language_model = {
        **model.language_model.config.to_dict(),
        "dtype": _dtype(tensors["language_model.model.embed_tokens.weight"]),
    }
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
    save_file(tensors, folder / WEIGHTS_FILE)
    keep_legacy(model.tokenizer)
    model.tokenizer.save_pretrained(folder)
    if tower is not None:
        (folder / PREPROCESSOR).write_text(json.dumps(tower.preprocessing, indent=1) + "\n")
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return compressor


def keep_legacy(tokenizer: Any) -> None:
    """Have a tokenizer's files say how it treats text after a control token: transformers 5.23 leaves `legacy: true` out."""
    if getattr(tokenizer, "legacy", None) is not None:
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
    device: str = "cpu",
    method_seed: int | None = None,
) -> VocoLlama:
    """The model of a checkpoint directory. `layout` replaces the stored one; `dtype` None keeps the stored number type.

    Under another method than the stored one, the stored method's own weights are left out. Where the checkpoint lacks those of
    `layout`'s method, they are drawn with `method_seed`; None: they are missing.

    Raises ValueError for weights that do not fit, and for an attention backend that cannot honour the mask.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = storage.get_directory(model_uri(checkpoint), Path(temporary) / "model")
        config = json.loads((folder / CONFIG_FILE).read_text())
        state = load_file(folder / WEIGHTS_FILE)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        stored = json.loads((folder / PREPROCESSOR).read_text()) if (folder / PREPROCESSOR).is_file() else None
    facts = dict(config["language_model"])
    lm_config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    with torch.device("meta"):  # the file's own tensors take the place of its weights: nothing is in memory twice
        language_model = AutoModelForCausalLM.from_config(lm_config)
    rotary = language_model.model.rotary_emb
    language_model.model.rotary_emb = type(rotary)(lm_config)  # its frequencies are in no file
    tower = empty_tower(config["tower"], config["net"], stored) if config["tower"] is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(method_seed or 0)
        read_as = layout or Layout(**config["layout"])
        model = VocoLlama(language_model, read_as, config["feature_width"], tower, tokenizer, attention)
    state = _with_method_weights(state, model, config["layout"]["method"], drawn=method_seed is not None)
    expected = own_state(model).keys()
    if expected != state.keys():
        missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
        raise ValueError(f"{checkpoint}: weights do not fit: missing {missing}, unexpected {unexpected}")
    model.load_state_dict(state, strict=False, assign=True)
    if lm_config.tie_word_embeddings:
        language_model.lm_head.weight = language_model.model.embed_tokens.weight
    for part in (model.language_model, model.projector, model.method_module):
        if part is not None:
            part.to(dtype or model.dtype)
    if model.image_newline is not None:
        model.image_newline.data = model.image_newline.to(model.dtype)
    if model.tower is not None:
        model.tower.float().use_channels_last()
    model.compressor, model.compressor_tokens = config["compressor"], config["compressor_tokens"]
    model.preprocessing = config["preprocessing"]
    if tower is not None and stored is not None and stored.get("rgb") != RGB_RULE:
        model.preprocessing = tower.identity  # of a version that made other pixels of some images: nothing of it is reused
    return model.to(device).eval()


def _with_method_weights(state: dict[str, Tensor], model: VocoLlama, stored: str, drawn: bool) -> dict[str, Tensor]:
    """`state` without the weights of the `stored` method if the model has another one; with the model's `drawn` ones if it
    lacks them.
    """
    method = model.layout.method
    if stored != method:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{stored}.")}
    if drawn and not any(name.startswith(f"{method}.") for name in state):
        state |= {name: tensor for name, tensor in own_state(model).items() if name.startswith(f"{method}.")}
    return state


def copy_compressor(start: str, output: str) -> None:
    """Copy the compressor of the checkpoint `start` to `<output>/compressor`, for a model that was trained on its caches."""
    source = compressor_uri(start) if own_compressor(start) else start
    with tempfile.TemporaryDirectory() as temporary:
        folder = storage.get_directory(model_uri(source), Path(temporary) / "model")
        storage.put_directory(folder, model_uri(compressor_uri(output)))
