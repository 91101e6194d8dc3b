"""A checkpoint as transformers' plain LLaVA, for use in other software."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from voco.errors import Refused
from voco.model.interop.jinja_template import jinja_template
from voco.model.interop.llava_import import LINEARS, SPECIAL
from voco.model.vision.tower import CLASS_TOKENS, NETS, VisionTower
from voco.model.voco_llama import VocoLlama
from voco.model.weights import compressor_hash, keep_legacy, own_state
from voco.store import storage

CONFIGS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
SHARD = "5GB"


def export_llava(model: VocoLlama, checkpoint: str, output: str) -> list[str]:
    """Write `LlavaForConditionalGeneration`'s directory with its processor, and return what that cannot keep, a line each.

    A model that cuts images into tiles becomes a `LlavaNextForConditionalGeneration`. `output` is a local path or `s3://`.
    Weights keep their number type. Raises Refused for a tower other than CLIP or SigLIP, and for a compression method with
    weights.
    """
    tower = model.tower
    if tower is None or tower.config["name"] not in NETS:
        raise Refused(f"{checkpoint}: LLaVA has a tower of {sorted(NETS)}; this model cannot be exported")
    if model.method_module is not None:
        raise Refused(f"{checkpoint}: LLaVA has no {model.layout.rule.label}; this model cannot be exported")
    llava = _llava(model, tower)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "llava"
        llava.save_pretrained(folder, max_shard_size=SHARD)
        keep_legacy(model.tokenizer)
        model.tokenizer.chat_template = jinja_template(model.layout, model.tokenizer)
        _processor(model, tower).save_pretrained(folder)
        storage.put_directory(folder, storage.resolve(output))
    return _dropped(model)


def _llava(model: VocoLlama, tower: VisionTower) -> LlavaForConditionalGeneration | LlavaNextForConditionalGeneration:
    """transformers' own class around our tensors: none is copied."""
    name, language_model, layout = tower.config["name"], model.language_model, model.layout
    config: dict[str, Any] = dict(
        vision_config=CONFIGS[name](**(tower.net_config or {})),
        text_config=language_model.config,
        image_token_index=layout.image_id,
        image_seq_length=layout.vision_slots,
        vision_feature_layer=tower.config["layer"],
        vision_feature_select_strategy="default" if CLASS_TOKENS[name] else "full",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        dtype=model.dtype,
    )
    llava: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
    with torch.device("meta"):
        if layout.anyres is None:
            llava = LlavaForConditionalGeneration(LlavaConfig(**config))
        else:
            pinpoints = [list(size) for size in layout.anyres.grid_pinpoints]
            llava = LlavaNextForConditionalGeneration(LlavaNextConfig(**config, image_grid_pinpoints=pinpoints))
    linears = {f"projector.{index}.": f"model.multi_modal_projector.{linear}." for linear, index in LINEARS.items()}
    prefixes = {
        "language_model.model.": "model.language_model.",
        "language_model.": "",
        "tower.net.": "model.vision_tower.",
        "image_newline": "model.image_newline",
        **linears,
    }
    state = {}
    for key, tensor in own_state(model).items():
        prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
        state[prefixes[prefix] + key.removeprefix(prefix)] = tensor
    if language_model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    llava.load_state_dict(state, assign=True)
    rows = language_model.get_input_embeddings().weight.shape[0]
    suppressed = [layout.voco_id, layout.image_id, *range(len(model.tokenizer), rows)]
    llava.generation_config = GenerationConfig(
        bos_token_id=layout.bos_id,
        eos_token_id=list(layout.end_ids) if layout.stop_ids else layout.eos_id,
        pad_token_id=layout.pad_id,
        suppress_tokens=[token for token in suppressed if token not in layout.end_ids],
    )
    return llava


def _processor(model: VocoLlama, tower: VisionTower) -> LlavaProcessor | LlavaNextProcessor:
    """A processor that gives our tower's pixels: padded to a square with the mean colour, squeezed, or cut into tiles."""
    anyres = model.layout.anyres
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": tower.size},
        "crop_size": {"height": tower.size, "width": tower.size},
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
    }
    options: dict[str, Any] = {
        "patch_size": (tower.net_config or {})["patch_size"],
        "vision_feature_select_strategy": "default" if CLASS_TOKENS[tower.config["name"]] else "full",
        "image_token": SPECIAL["image"],
        "num_additional_image_tokens": CLASS_TOKENS[tower.config["name"]],
        "chat_template": model.tokenizer.chat_template,
    }
    if anyres is None and tower.fit == "squeeze":
        square = SiglipImageProcessor(size=sizes["crop_size"], image_mean=sizes["image_mean"], image_std=sizes["image_std"])
        return LlavaProcessor(square, model.tokenizer, **options)
    if anyres is None:
        return LlavaProcessor(LlavaImageProcessor(do_pad=True, **sizes), model.tokenizer, **options)
    pinpoints = [list(size) for size in anyres.grid_pinpoints]
    return LlavaNextProcessor(LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **sizes), model.tokenizer, **options)


def _dropped(model: VocoLlama) -> list[str]:
    layout, rule, dropped = model.layout, model.layout.rule, []
    if rule.views_apart:
        dropped.append(f"the mask of method {layout.method}: text will see all {layout.vision_slots} vision tokens")
    if rule.pooled:
        dropped.append(f"{rule.label}: text will see all {layout.vision_slots} vision tokens and not {layout.tokens} vectors")
    if layout.voco_tokens():
        dropped.append(f"{layout.tokens} <voco> after each image: the chat template writes them, no other prompt has them")
    if model.compressor != compressor_hash(own_state(model)):
        dropped.append("the frozen compressor that made this model's caches")
    return dropped
