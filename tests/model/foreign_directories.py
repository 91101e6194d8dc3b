"""Writes tiny LLaVA directories as other people save them, and changes what they hold."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model import llava_world as world
from model import test_directory_template as words
from model import test_foreign_files as files
from model import test_layouts as layouts
from model import test_llava_next as tiles
from model.test_foreign_files import changed_json
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor

Edit = Callable[[Path], Any]
Write = Callable[[Path], tuple[str, Any]]


def hf(
    text: str = "llama", tower: str = "clip", edit: Edit | None = None, shards: str = "5GB", bos: bool = True, **changes: Any
) -> Write:
    """A LLaVA-1.5 that transformers saves. `changes` of its configuration: text__KEY, vision__KEY, or a key of the LLaVA."""

    def write(folder: Path) -> tuple[str, Any]:
        vision, strategy = world.TOWERS[tower]
        parts = {"text": copy.deepcopy(world.TEXT[text]).to_dict(), "vision": copy.deepcopy(vision).to_dict()}
        rest = {"image_token_index": 259, "vision_feature_select_strategy": strategy}
        for key, value in changes.items():
            part, _, name = key.partition("__")
            if name:
                parts[part][name] = value
            else:
                rest[key] = value
        torch.manual_seed(3)
        config = LlavaConfig(
            text_config=type(world.TEXT[text])(**parts["text"]), vision_config=type(vision)(**parts["vision"]), **rest
        )
        model = LlavaForConditionalGeneration(config)
        world.saved(world.loud(model), folder, tower, shards, bos)
        if edit is not None:
            edit(folder)
        return str(folder), None

    return write


def own_layout(text: str = "llama", edit: Edit | None = None, **changes: Any) -> Write:
    """The same in LLaVA's own layout, with `changes` of its configuration."""

    def write(folder: Path) -> tuple[str, Any]:
        reference = world.llava(text)
        layouts.apart(reference, folder, **changes)
        if edit is not None:
            edit(folder / "llava")
        return str(folder / "llava"), reference

    return write


def next_hf(text: str = "llama", edit: Edit | None = None) -> Write:
    """A LLaVA-1.6 that transformers saves."""

    def write(folder: Path) -> tuple[str, Any]:
        uri = world.saved(tiles.next_llava(text), folder)
        tiles.processor().save_pretrained(folder)
        if edit is not None:
            edit(folder)
        return uri, None

    return write


def in_words(family: str, template: str | None, markers: bool = True, file: str = "tokenizer") -> Write:
    """A LLaVA with a chat template, and rows for every marker's token."""

    def write(folder: Path) -> tuple[str, Any]:
        hf(family, text__vocab_size=400, **({"text__sliding_window": 512} if family == "mistral" else {}))(folder)
        return words.saved(folder, family, template, file, markers, model=False), None

    return write


def keys(**changes: Any) -> Edit:
    """Other values in config.json; None takes a key out. A key of a nested block is text_config__KEY or vision_config__KEY."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            block, _, name = key.rpartition("__")
            target = config[block] if block else config
            if value is None:
                target.pop(name, None)
            else:
                target[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def options(**changes: Any) -> Edit:
    """Other options of the image processor; None takes one out."""
    return lambda folder: changed_json(folder / "preprocessor_config.json", **changes)


def renamed(*pairs: tuple[str, str]) -> Edit:
    """Weights under other names, by regular expressions, the first that fits."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        new = {}
        for name, tensor in tensors.items():
            pattern, replacement = next(((old, to) for old, to in pairs if re.search(old, name)), ("$^", ""))
            new[re.sub(pattern, replacement, name)] = tensor
        save_file(new, folder / "model.safetensors", {"format": "pt"})

    return edit


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], metadata: bool = True) -> Edit:
    """Other tensors in model.safetensors."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(
            {name: t.contiguous() for name, t in change(load_file(path)).items()}, path, {"format": "pt"} if metadata else None
        )

    return edit


def pickled(folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


def stray(folder: Path) -> None:
    tensors = {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}
    files.strays(folder, tensors)


def without(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def cast(kind: torch.dtype) -> Edit:
    def edit(folder: Path) -> None:
        weights(lambda tensors: {name: tensor.to(kind) for name, tensor in tensors.items()})(folder)
        keys(dtype=str(kind).removeprefix("torch."))(folder)

    return edit


def several_ends(folder: Path) -> tuple[str, Any]:
    return files.with_several_ends(folder), None


def plain_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] in ("<s>", "</s>")]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    changed_json(folder / "tokenizer_config.json", pad_token=None, extra_special_tokens=None, additional_special_tokens=None)


def padding(folder: Path) -> None:
    side = {"height": 32, "width": 32}
    LlavaImageProcessor(do_pad=True, size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)


def own_tower(folder: Path) -> None:
    path = folder / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(path, weights_only=True) | {"model.vision_tower.vision_tower.a": torch.ones(1)}, path)


def projector_alone(folder: Path) -> None:
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    torch.save(torch.load(folder.parent / "mm_projector.bin", weights_only=True), folder / "mm_projector.bin")
