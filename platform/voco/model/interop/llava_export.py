"""A checkpoint as transformers' plain LLaVA, for use elsewhere."""

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

import voco.model
from voco.errors import Refused
from voco.model.interop.llava_import import LINEARS, SPECIAL
from voco.model.vision.tower import CLASS_TOKENS, NETS, VisionTower
from voco.model.voco_llama import VocoLlama
from voco.model.weights import compressor_hash, own_state
from voco.store import storage

CONFIGS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
SHARD = "5GB"


def export_llava(checkpoint: str, output: str) -> list[str]:
    """Write `LlavaForConditionalGeneration`'s directory, processor included, and return what it cannot keep, a line each.

    A model that cuts images into tiles becomes a `LlavaNextForConditionalGeneration`. `output` is a local path or `s3://`.
    Weights keep their number type. Raises Refused for a model without a CLIP or SigLIP tower, which LLaVA does not know.
    """
    model = voco.model.load(checkpoint)
    tower = model.tower
    if tower is None or tower.config["name"] not in NETS:
        raise Refused(f"{checkpoint}: LLaVA has a tower of {sorted(NETS)}; this model cannot be exported")
    if model.q_former is not None:
        raise Refused(f"{checkpoint}: LLaVA has no Q-Former; this model cannot be exported")
    whole = _llava(model, tower)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "llava"
        whole.save_pretrained(folder, max_shard_size=SHARD)
        _processor(model, tower).save_pretrained(folder)
        storage.put_directory(folder, storage.resolve(output))
    return _dropped(model)


def _llava(model: VocoLlama, tower: VisionTower) -> LlavaForConditionalGeneration | LlavaNextForConditionalGeneration:
    """transformers' own class around our tensors: none is copied."""
    name, core, layout = tower.config["name"], model.language_model, model.layout
    facts: dict[str, Any] = dict(
        vision_config=CONFIGS[name](**(tower.net_config or {})),
        text_config=core.config,
        image_token_index=layout.image_id,
        image_seq_length=layout.vision_slots,
        vision_feature_layer=tower.config["layer"],
        vision_feature_select_strategy="default" if CLASS_TOKENS[name] else "full",
        tie_word_embeddings=core.config.tie_word_embeddings,
        dtype=model.dtype,
    )
    whole: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
    with torch.device("meta"):
        if layout.anyres is None:
            whole = LlavaForConditionalGeneration(LlavaConfig(**facts))
        else:
            pinpoints = [list(one) for one in layout.anyres.grid_pinpoints]
            whole = LlavaNextForConditionalGeneration(LlavaNextConfig(**facts, image_grid_pinpoints=pinpoints))
    linears = {f"projector.{ours}.": f"model.multi_modal_projector.{theirs}." for theirs, ours in LINEARS.items()}
    names = {
        "language_model.model.": "model.language_model.",
        "language_model.": "",
        "tower.net.": "model.vision_tower.",
        "image_newline": "model.image_newline",
        **linears,
    }
    state = {}
    for key, tensor in own_state(model).items():
        start = next(start for start in names if key.startswith(start))
        state[names[start] + key.removeprefix(start)] = tensor
    if core.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    whole.load_state_dict(state, assign=True)
    rows = core.get_input_embeddings().weight.shape[0]
    never = [layout.voco_id, layout.image_id, *range(len(model.tokenizer), rows)]
    whole.generation_config = GenerationConfig(
        bos_token_id=layout.bos_id, eos_token_id=layout.eos_id, pad_token_id=layout.pad_id, suppress_tokens=never
    )
    return whole


def _processor(model: VocoLlama, tower: VisionTower) -> LlavaProcessor | LlavaNextProcessor:
    """Pixels as our tower sees them: padded to a square with the mean colour, or squeezed, then resized; or cut into tiles."""
    anyres = model.layout.anyres
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": tower.size},
        "crop_size": {"height": tower.size, "width": tower.size},
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
    }
    around: dict[str, Any] = {
        "patch_size": (tower.net_config or {})["patch_size"],
        "vision_feature_select_strategy": "default" if CLASS_TOKENS[tower.config["name"]] else "full",
        "image_token": SPECIAL["image"],
        "num_additional_image_tokens": CLASS_TOKENS[tower.config["name"]],
    }
    if anyres is None and tower.fit == "squeeze":
        square = SiglipImageProcessor(size=sizes["crop_size"], image_mean=sizes["image_mean"], image_std=sizes["image_std"])
        return LlavaProcessor(square, model.tokenizer, **around)
    if anyres is None:
        return LlavaProcessor(LlavaImageProcessor(do_pad=True, **sizes), model.tokenizer, **around)
    pinpoints = [list(one) for one in anyres.grid_pinpoints]
    return LlavaNextProcessor(LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **sizes), model.tokenizer, **around)


def _dropped(model: VocoLlama) -> list[str]:
    layout, out = model.layout, []
    if layout.method == "voco":
        out.append(f"the mask of method voco: text will see all {layout.vision_slots} vision tokens, as in method none")
    if layout.method == "avg_pool":
        out.append(f"average pooling: text will see all {layout.vision_slots} vision tokens and not their {layout.tokens} means")
    if layout.voco_tokens():
        out.append(f"{layout.tokens} <voco> behind each image: no processor adds them, a prompt has to hold them")
    out.append(f"the prompt's template, {layout.template}: no chat template is written")
    if model.compressor != compressor_hash(own_state(model)):
        out.append("the frozen compressor that made this model's caches")
    return out
