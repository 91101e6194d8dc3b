"""A new model: a language model from nothing, for small machines, or a pretrained one, beside a pretrained tower."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from voco import storage
from voco.blocks import Llama, Method, Model, Text
from voco.model import vision_tower
from voco.model.voco_llama import VocoLlama
from voco.tokens import Layout

SPECIAL = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "image": "<image>", "voco": "<voco>"}
ROUND_UP = 64  # rows of the vocabulary: odd sizes make slow matrix products


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` entries, control tokens included. The same texts give the same tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL.values()],
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=SPECIAL["bos"], eos_token=SPECIAL["eos"], pad_token=SPECIAL["pad"]
    )


def layout_for(tokenizer: Any, method: Method, tokens: int, text: Text, vision_slots: int) -> Layout:
    ids = {name: tokenizer.convert_tokens_to_ids(SPECIAL[name]) for name in ("image", "voco")}
    ids |= {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    return Layout(
        method=method,
        tokens=tokens,
        vision_slots=vision_slots,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        image_id=ids["image"],
        voco_id=ids["voco"],
        separator_ids=tuple(tokenizer("\n", add_special_tokens=False)["input_ids"]),
        template=text.template,
        newlines=text.newlines,
    )


def create(model: Model, method: Method, tokens: int, text: Text, texts: Iterable[str], seed: int) -> VocoLlama:
    """The job file's `model` block: a language model from nothing (a function of `seed` and `texts`) or a pretrained one,
    a random projector, and the tower with its pretrained weights. `tokens` is N, 0 for a model without <voco>.
    """
    tower = vision_tower.pretrained(model.tower.model_dump(exclude_none=True))
    vision_slots, feature_width = tower.shape
    torch.manual_seed(seed)
    if model.llama is not None:
        tokenizer = train_tokenizer(texts, model.llama.vocabulary)
        language_model = LlamaForCausalLM(_llama_config(model.llama, tokenizer))
    else:
        tokenizer, language_model = pretrained(str(model.pretrained))
    layout = layout_for(tokenizer, method, tokens, text, vision_slots)
    return VocoLlama(language_model, layout, feature_width, tower, tokenizer)


def pretrained(uri: str) -> tuple[Any, Any]:
    """Tokenizer and language model of a directory that transformers saved, with rows for `<image>`, `<voco>` and padding.

    New rows are drawn as transformers initialises embeddings; the table is rounded up to a multiple of 64.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = storage.get_directory(storage.resolve(uri), Path(place) / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        language_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    new = [SPECIAL["image"], SPECIAL["voco"]] + ([SPECIAL["pad"]] if tokenizer.pad_token is None else [])
    tokenizer.add_special_tokens({"additional_special_tokens": new[:2]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": SPECIAL["pad"]})
    language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROUND_UP, mean_resizing=False)
    return tokenizer, language_model


def _llama_config(llama: Llama, tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // ROUND_UP) * ROUND_UP,
        hidden_size=llama.width,
        intermediate_size=llama.mlp_width,
        num_hidden_layers=llama.layers,
        num_attention_heads=llama.heads,
        num_key_value_heads=llama.kv_heads,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=llama.width**-0.5,  # the usual 0.02 suits widths of thousands; small ones start too quiet
    )
