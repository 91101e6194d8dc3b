"""One directory holds a model whole: `model.safetensors`, tokenizer, `preprocessor_config.json`, `config.json`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from voco.model.fingerprint import hash_tensors
from voco.model.vision.tower import empty_tower
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import Layout
from voco.store import storage

FORMAT = 1
PREPROCESSOR = "preprocessor_config.json"
Q_FORMER = "q_former."  # its weights' names start so
COMPRESSOR = "compressor"  # directory in a video checkpoint that holds the frozen maker of its caches


def compressor_hash(state: dict[str, Tensor]) -> str:
    """The hash of the weights that make caches: all but the output head, which no cache passes through."""
    return hash_tensors((name, tensor) for name, tensor in state.items() if not name.startswith("language_model.lm_head."))


def own_state(model: VocoLlama) -> dict[str, Tensor]:
    """Weights by name, each tensor once: a tied output head is the embedding table."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("inv_freq")}
    if model.language_model.config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    return state


def save_checkpoint(model: VocoLlama, state: dict[str, Tensor], folder: Path, keep_compressor: bool = False) -> str:
    """Write `state` (names as in `own_state`) with the model's configuration, and return the compressor's hash.

    The state is apart from the model because training gathers it from shards. With `keep_compressor` the model goes on
    reading the caches of the compressor that it was loaded with; else it is its own.
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
    save_file(tensors, folder / "model.safetensors")
    model.tokenizer.save_pretrained(folder)
    if tower is not None:
        (folder / PREPROCESSOR).write_text(json.dumps(tower.preprocessing, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return compressor


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def read_config(checkpoint: str) -> dict[str, Any]:
    """`model/config.json` of a checkpoint directory, at a local path or `s3://`."""
    config: dict[str, Any] = storage.read_json(storage.join(storage.resolve(checkpoint), "model", "config.json"))
    return config


def read_tokenizer(checkpoint: str) -> Any:
    """A checkpoint's tokenizer alone, without its weights."""
    uri = storage.join(storage.resolve(checkpoint), "model")
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.list_names(uri):
            if name.startswith(("tokenizer", "special_tokens")):
                (Path(folder) / name).write_bytes(storage.read_bytes(storage.join(uri, name)))
        return AutoTokenizer.from_pretrained(folder)


def load_compressor(checkpoint: str, device: str = "cpu") -> VocoLlama:
    """The model that makes the caches which a checkpoint reads: what it was trained against, or itself."""
    kept = storage.join(storage.resolve(checkpoint), COMPRESSOR)
    place = kept if storage.exists(storage.join(kept, "model", "config.json")) else checkpoint
    return load_checkpoint(place, device=device)


def load_checkpoint(
    checkpoint: str,
    layout: Layout | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "segments",
    device: str = "cpu",
    new_q_former: int | None = None,
) -> VocoLlama:
    """The model of a checkpoint directory. `layout` reads it in another way than it was trained; `dtype` None keeps its own.

    `new_q_former` is the seed from which a Q-Former is made that the layout wants and the checkpoint lacks; one that the layout
    does not want is left out.

    Raises ValueError for weights that do not fit, and for an attention backend that cannot honour the mask.
    """
    uri = storage.join(storage.resolve(checkpoint), "model")
    with tempfile.TemporaryDirectory() as place:
        folder = storage.get_directory(uri, Path(place) / "model")
        config = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
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
        torch.manual_seed(new_q_former or 0)
        reads = layout or Layout(**config["layout"])
        model = VocoLlama(language_model, reads, config["feature_width"], tower, tokenizer, attention)
    if new_q_former is not None and not any(name.startswith(Q_FORMER) for name in state):
        state |= {name: tensor for name, tensor in own_state(model).items() if name.startswith(Q_FORMER)}
    if model.q_former is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(Q_FORMER)}
    wanted = own_state(model).keys()
    if wanted != state.keys():
        missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
        raise ValueError(f"{checkpoint}: weights do not fit: missing {missing}, unexpected {unexpected}")
    model.load_state_dict(state, strict=False, assign=True)
    if lm_config.tie_word_embeddings:
        language_model.lm_head.weight = language_model.model.embed_tokens.weight
    for part in (model.language_model, model.projector, model.q_former):
        if part is not None:
            part.to(dtype or model.dtype)
    if model.image_newline is not None:
        model.image_newline.data = model.image_newline.to(model.dtype)
    if model.tower is not None:
        model.tower.float().arrange()
    model.compressor, model.compressor_tokens = config["compressor"], config["compressor_tokens"]
    model.preprocessing = config["preprocessing"]
    return model.to(device).eval()


def keep_compressor(start: str, output: str) -> None:
    """Copy the maker of a checkpoint's caches to `<output>/compressor`, for a model that was trained against them."""
    kept = storage.join(start, COMPRESSOR)
    source = kept if storage.exists(storage.join(kept, "model", "config.json")) else start
    with tempfile.TemporaryDirectory() as place:
        folder = storage.get_directory(storage.join(source, "model"), Path(place) / "model")
        storage.put_directory(folder, storage.join(output, COMPRESSOR, "model"))
