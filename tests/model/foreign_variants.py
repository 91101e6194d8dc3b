"""Tiny LLaVA directories as other people save them: `VARIANTS`, each with what becomes of it.

`bench/checkpoint_variants.py` compares all of them with transformers, `test_foreign_variants.py` some.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from model import foreign_directories as make
from model import llava_world as world
from model import test_directory_template as words
from model import test_foreign_files as files
from model import test_layouts as layouts
from model.foreign_directories import Write, hf, in_words, keys, next_hf, options, own_layout, renamed, weights, without


@dataclass(frozen=True)
class Variant:
    """`write` fills a directory and returns its URI and, where transformers cannot read it, the model that it was made from.

    `refused` is a pattern of the line with which it must be refused; None for one that must be read exactly.
    """

    name: str
    write: Write
    refused: str | None = None


def read(rows: dict[str, Write]) -> list[Variant]:
    return [Variant(name, write) for name, write in rows.items()]


def refused(rows: dict[str, tuple[Write, str]]) -> list[Variant]:
    return [Variant(name, write, message) for name, (write, message) in rows.items()]


# of weights in llava-hf's files on the hub, and in memory since transformers 4.52
ON_THE_HUB = ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),)
IN_MEMORY = (
    (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.", ""),
    (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
)  # fmt: skip
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 128}


def rope(kind: str = "default", **parameters: Any) -> Write:
    return hf(text__rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters})


def language_models() -> list[Variant]:
    """Families, and what their configurations may say."""
    rows = {f"{text} with {tower}": hf(text, tower) for text, tower in itertools.product(world.TEXT, world.TOWERS)}
    rows |= {f"LLaVA-1.6 on {text}": next_hf(text) for text in world.TEXT}
    for outer, inner in itertools.product((True, False), repeat=2):
        tied = keys(tie_word_embeddings=outer, text_config__tie_word_embeddings=inner)
        for text in ("tied", "llama"):
            name = "without" if text == "tied" else "with"
            rows[f"tied {outer}, of its text {inner}, {name} a head"] = hf(text, edit=tied)
    del rows["tied False, of its text False, without a head"]  # no complete model
    older = {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rows |= {
        "rope default": rope(),
        "rope theta 500000": rope(rope_theta=5e5),
        "rope linear": rope("linear", factor=2.0),
        "rope llama3": rope("llama3", **LLAMA_3),
        "rope yarn": rope("yarn", factor=4.0, original_max_position_embeddings=128),
        "rope_scaling as before transformers 5": hf(edit=keys(**{f"text_config__{key}": value for key, value in older.items()})),
        "attention_bias": hf(text__attention_bias=True),
        "mlp_bias": hf(text__mlp_bias=True),
        "head_dim 16": hf(text__head_dim=16),
        "head_dim 16 of Mistral": hf("mistral", text__head_dim=16),
        "keys for every query": hf(text__num_key_value_heads=4),
        "one head of keys": hf(text__num_key_value_heads=1),
        "attention_bias of Qwen3": hf("qwen3", text__attention_bias=True),
        "hidden_act gelu": hf(text__hidden_act="gelu"),
        "rms_norm_eps 1e-3": hf(text__rms_norm_eps=1e-3),
        "one layer": hf(text__num_hidden_layers=1),
        "attention_dropout": hf(text__attention_dropout=0.1),
        "pretraining_tp 2": hf(text__pretraining_tp=2),
        "Mistral without a sliding window": hf("mistral", text__sliding_window=None),
        "Qwen2, sliding window off": hf("qwen2", text__use_sliding_window=False, text__sliding_window=8),
        "Qwen2, sliding window in upper layers": hf(
            "qwen2", text__use_sliding_window=True, text__sliding_window=256, text__max_window_layers=1, text__layer_types=None
        ),
        "float16": hf(edit=make.cast(torch.float16)),
        "bfloat16": hf(edit=make.cast(torch.bfloat16)),
    }
    return read(rows) + refused(
        {
            "rope dynamic": (rope("dynamic", factor=2.0), "changes with the sequence's length"),
            "rope longrope": (rope("longrope", **LONG), "changes with the sequence's length"),
            "sliding window shorter than the prompt": (hf("mistral", text__sliding_window=32), "the model.s 32 positions"),
            "fewer positions than the prompt": (hf(text__max_position_embeddings=24), "the model.s 24 positions"),
        }
    )


def vision() -> list[Variant]:
    """Which layer and positions of the tower, and the projector."""
    rows = {f"vision_feature_layer {layer}": hf(vision_feature_layer=layer) for layer in (-4, -3, -1, 1, 2, 3)}
    rows |= {
        "vision_feature_layer left out": hf(edit=keys(vision_feature_layer=None)),
        "vision_feature_select_strategy left out": hf(edit=keys(vision_feature_select_strategy=None)),
        "vision_config.model_type left out": hf(edit=keys(vision_config__model_type=None)),
        "text_config.model_type left out": hf(edit=keys(text_config__model_type=None)),
        "tower, hidden_act gelu": hf(vision__hidden_act="gelu"),
        "tower, layer_norm_eps": hf(vision__layer_norm_eps=1e-3),
        "tower, patches of 16": hf(vision__patch_size=16),
        "tower, patches that do not divide the side": hf(vision__patch_size=10),
        "SigLIP without a head": hf(tower="siglip", vision__vision_use_head=False),
        "SigLIP, layer -1": hf(tower="siglip", vision_feature_layer=-1),
        "image_seq_length 99": hf(image_seq_length=99),
        "image_token_index of a letter": hf(image_token_index=5),
        "LLaVA-1.6 without use_image_newline_parameter": next_hf(edit=keys(use_image_newline_parameter=None)),
    }
    full, several = {"vision_feature_select_strategy": "full"}, {"vision_feature_layer": [-2, -1]}
    untyped = keys(vision_config__model_type=None)
    return read(rows) + refused(
        {
            "SigLIP, select strategy left out": (
                hf(tower="siglip", edit=keys(vision_feature_select_strategy=None)), "'full' of siglip .*got 'default'",
            ),
            "SigLIP, model_type left out": (hf(tower="siglip", edit=untyped), "strategy 'default' of clip"),
            "SigLIP, select strategy default": (
                hf(tower="siglip", vision_feature_select_strategy="default"), "'full' of siglip",
            ),
            "CLIP, select strategy full": (hf(**full), "strategy 'default' of clip"),
            "LLaVA-1.6, select strategy full": (next_hf(edit=keys(**full)), "'default' of clip"),
            "several layers": (hf(**several), "joins several layers"),
            "LLaVA-1.6, several layers": (next_hf(edit=keys(**several)), "joins several layers"),
            "a layer that the tower lacks": (hf(vision_feature_layer=-9), "tower.layer: expected -4 to 3"),
            "projector with relu": (hf(projector_hidden_act="relu"), "another projector"),
            "projector without biases": (hf(multimodal_projector_bias=False), "another projector"),
            "LLaVA-1.6 without image_grid_pinpoints": (next_hf(edit=keys(image_grid_pinpoints=None)), "pinpoints"),
        }
    )  # fmt: skip


def processors() -> list[Variant]:
    """Options of the image processor."""
    feature_extractor = options(image_processor_type=None, feature_extractor_type="CLIPFeatureExtractor")
    rows = {
        "no image processor": hf(edit=without("preprocessor_config.json")),
        "mean and std": hf(edit=options(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])),
        "mean left out": hf(edit=options(image_mean=None)),
        "sizes as one number": hf(edit=options(size=32, crop_size=32)),
        "do_center_crop false": hf(edit=options(do_center_crop=False, crop_size=None)),
        "do_convert_rgb false": hf(edit=options(do_convert_rgb=False)),
        "CLIPFeatureExtractor": hf(edit=feature_extractor),
        "CLIPImageProcessorFast": hf(edit=options(image_processor_type="CLIPImageProcessorFast")),
        "LlavaImageProcessor that pads": hf(edit=make.padding),
    }
    other = {f"processor: {changes}": (hf(edit=options(**changes)), message) for changes, message in files.OPTIONS}
    pinpoints = next_hf(edit=options(image_grid_pinpoints=[[32, 64]]))
    other["LLaVA-1.6, other pinpoints in its processor"] = (pinpoints, "image_grid_pinpoints of its image processor")
    return read(rows) + refused(other)


def prompts() -> list[Variant]:
    """Chat templates, system prompts and ends of an answer."""
    rows = {
        f"template {number} in {file}, {family}: {expected}": in_words(family, template, markers, file)
        for number, (family, template, file, markers, expected) in enumerate(words.CASES)
    }
    rows |= {
        f"system prompt {number}, {expected} on {family}": in_words(family, template)
        for number, (family, template, expected, _) in enumerate(words.SYSTEMS)
    }
    rows |= {
        "four ids end an answer": lambda folder: (files.with_several_ends(folder), None),
        "no generation_config.json": hf(edit=without("generation_config.json")),
        "a tokenizer that adds no BOS": hf(bos=False),
        "a tokenizer without <image> and padding": hf(edit=make.plain_tokenizer, image_token_index=260),
    }
    return read(rows) + refused(
        {
            f"system prompt that cannot be written, {number}": (in_words(family, template), message)
            for number, (family, template, message) in enumerate(words.REFUSED_SYSTEMS)
        }
        | {
            "a template of other markers": (in_words("llama", words.HUMAN), "none of vicuna_v1"),
            "a template that is no Jinja": (in_words("llama", "{% for"), "cannot be rendered"),
        }
    )


def file_forms() -> list[Variant]:
    """Which files hold the weights, and under which names."""
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    rotary = {f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    rows = {
        "shards": hf(shards="20KB"),
        "one pickled file": hf(edit=make.pickled),
        "stray files beside one file": hf(edit=make.stray),
        "stray files beside shards": hf(shards="20KB", edit=make.stray),
        "safetensors without metadata": hf(edit=weights(lambda tensors: tensors, metadata=False)),
        "names of weights as on the hub": hf(edit=renamed(*ON_THE_HUB)),
        "as on the hub, SigLIP": hf(tower="siglip", edit=renamed(*ON_THE_HUB)),
        "as on the hub, LLaVA-1.6": next_hf(edit=renamed(*ON_THE_HUB)),
        "names of weights as in memory": hf(edit=renamed(*IN_MEMORY)),
        "as in memory, LLaVA-1.6": next_hf(edit=renamed(*IN_MEMORY)),
        "frequencies among the weights": hf(edit=weights(lambda tensors: tensors | rotary)),
        "a weight that nothing reads": hf(edit=weights(lambda tensors: tensors | {"other.weight": torch.ones(2)})),
    }
    other = {f"broken: {name}": (hf(shards="20KB", edit=damage), line) for name, (damage, line) in files.BROKEN.items()}
    other |= {
        f"quantized by {kind}": (hf(edit=keys(quantization_config={"quant_method": kind, **more})), "quantized")
        for kind, more in (("bitsandbytes", {"load_in_4bit": True}), ("gptq", {"bits": 4}), ("awq", {"bits": 4}))
    }
    other |= {
        f"model_type {kind}": (hf(edit=keys(model_type=kind)), f"'{kind}', which is not supported yet")
        for kind in ("llava_onevision", "vipllava", "idefics3", "other")
    }
    missing = weights(lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    other |= {
        "a weight is missing": (hf(edit=missing), "lacks weights"),
        "a weight of another shape": (hf(edit=weights(lambda tensors: tensors | {name: tensors[name][:7]})), "up_proj"),
        "weights of TensorFlow alone": (
            hf(edit=lambda f: (f / "model.safetensors").rename(f / "tf_model.h5")),
            "holds no weights",
        ),
    }
    return read(rows) + refused(other)


def own_layouts() -> list[Variant]:
    """LLaVA's own layout."""
    kinds = (("llama", "llava_llama"), ("llama", "llava"), ("tied", "llava_llama"), ("mistral", "llava_mistral"))
    rows = {
        f"LLaVA's own layout, {kind} on {text}": own_layout(text, model_type=kind)
        for text, kind in (*kinds, ("qwen2", "llava_qwen"))
    }
    for key in ("mm_vision_select_feature", "mm_projector_type", "mm_patch_merge_type", "mm_use_im_start_end"):
        rows[f"own layout, {key} left out"] = own_layout(edit=keys(**{key: None}))
    rows["own layout, mm_use_im_patch_token"] = own_layout(mm_use_im_patch_token=True)
    other = {f"own layout, {changes}": (own_layout(**changes), message) for changes, message in layouts.REFUSED}
    other |= {
        "own layout on Qwen3": (own_layout("qwen3", model_type="llava_qwen3"), "expected model_type"),
        "own layout, mm_use_im_start_end": (own_layout(mm_use_im_start_end=True), "mm_use_im_start_end True"),
        "own layout, spatial_unpad": (own_layout(mm_patch_merge_type="spatial_unpad"), "mm_patch_merge_type"),
        "own layout, no select layer": (own_layout(mm_vision_select_layer=None), "mm_vision_select_layer"),
        "own layout, tower trained with it": (own_layout(edit=make.own_tower), "a tower that was trained with it"),
        "own layout, projector alone": (own_layout(edit=make.projector_alone), "holds no weights"),
        "own layout, tower is not there": (own_layout(mm_vision_tower="/nowhere/clip"), "holds no config.json"),
    }
    return read(rows) + refused(other)


VARIANTS = [*language_models(), *vision(), *processors(), *prompts(), *file_forms(), *own_layouts()]
