"""A model from nothing, for small machines: its own tokenizer and a random Llama beside a pretrained tower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from voco.model import vision_tower
from voco.model.voco_llama import VocoLlama
from voco.spec import Compression, Model, Text
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


def layout_for(tokenizer: Any, compression: Compression, text: Text, vision_slots: int) -> Layout:
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    return Layout(
        method=compression.method,
        tokens=compression.tokens,
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


def create(model: Model, compression: Compression, text: Text, texts: Iterable[str], seed: int) -> VocoLlama:
    """The job file's `model` block with random weights (a function of `seed`) and the tower's pretrained ones."""
    tokenizer = train_tokenizer(texts, model.llama.vocabulary)
    tower = vision_tower.pretrained(model.tower.model_dump(exclude_none=True))
    vision_slots, feature_width = tower.shape
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // ROUND_UP) * ROUND_UP,
        hidden_size=model.llama.width,
        intermediate_size=model.llama.mlp_width,
        num_hidden_layers=model.llama.layers,
        num_attention_heads=model.llama.heads,
        num_key_value_heads=model.llama.kv_heads,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=model.llama.width**-0.5,  # the usual 0.02 suits widths of thousands; small ones start too quiet
        attn_implementation="sdpa",
    )
    layout = layout_for(tokenizer, compression, text, vision_slots)
    return VocoLlama(LlamaForCausalLM(config), layout, feature_width, tower, tokenizer)
