"""A new model: a language model from scratch, for small machines, or a pretrained one, with a pretrained tower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from voco.job.config import Llama, Model, Text
from voco.model.interop import llava_import
from voco.model.interop.directory_template import choose_text
from voco.model.interop.llava_import import ROUND_UP, SPECIAL
from voco.model.vision.tower import load_tower
from voco.model.voco_llama import VocoLlama
from voco.model.weights import compressor_hash, own_state
from voco.sequence.anyres import Anyres
from voco.sequence.chat_template import end_of_answer_id
from voco.sequence.sequence import SEPARATOR, Layout


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` entries, control tokens included. The same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL.values()],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL["bos"], eos_token=SPECIAL["eos"], pad_token=SPECIAL["pad"]
    )


def new_layout(
    tokenizer: Any,
    method: str,
    tokens: int,
    text: Text,
    vision_slots: int,
    anyres: Anyres | None = None,
    q_former_layers: int = 0,
    stop_ids: tuple[int, ...] = (),
) -> Layout:
    """The layout of a new model, with the ids of its tokenizer. Raises Refused for a template that the tokenizer cannot have."""
    ids = {name: tokenizer.convert_tokens_to_ids(SPECIAL[name]) for name in ("image", "voco")}
    ids |= {"bos": tokenizer.bos_token_id, "eos": end_of_answer_id(text.template, tokenizer), "pad": tokenizer.pad_token_id}
    return Layout(
        method=method,
        tokens=tokens,
        vision_slots=vision_slots,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        stop_ids=tuple(token for token in stop_ids if token != ids["eos"]),
        pad_id=ids["pad"],
        image_id=ids["image"],
        voco_id=ids["voco"],
        separator_ids=tuple(tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]),
        template=text.template,
        newlines=text.newlines,
        system=text.system,
        anyres=anyres,
        q_former_layers=q_former_layers,
    )


def create_model(
    model: Model, method: str, tokens: int, text: Text | None, texts: Iterable[str], seed: int, q_former_layers: int = 0
) -> VocoLlama:
    """The job file's `model` block: a language model from scratch (a function of `seed` and `texts`) or a pretrained one, with
    its own projector, an aligned one or a random one, and the tower with its pretrained weights. `tokens` is N, 0 for a model
    without <voco>. `text` None takes the pretrained model's own template. The method's own weights are random.
    """
    tower_block = None if model.tower is None else model.tower.model_dump(exclude_none=True)
    if model.pretrained is not None:
        torch.manual_seed(seed)  # for rows of new tokens
        parts = llava_import.read_pretrained(model.pretrained, tower_block, model.projector)
        vision_slots, feature_width = parts.tower.shape
        text = choose_text(text, parts.template, parts.tokenizer, parts.llava_family, model.pretrained)
        anyres, stop_ids = parts.tower.anyres, parts.stop_ids
        layout = new_layout(parts.tokenizer, method, tokens, text, vision_slots, anyres, q_former_layers, stop_ids)
        layout = layout.model_copy(update={"bos_id": parts.bos_id})
        built = VocoLlama(parts.language_model, layout, feature_width, parts.tower, parts.tokenizer)
        if parts.projector is not None:
            built.projector.load_state_dict(parts.projector)
        for module in (built.projector, built.method_module):
            if module is not None:
                module.to(parts.language_model.dtype)
        if built.image_newline is not None:
            newline = built.image_newline if parts.newline is None else parts.newline
            built.image_newline.data = newline.detach().to(parts.language_model.dtype)
        return built.eval()
    assert model.llama is not None
    assert tower_block is not None
    tower = load_tower(tower_block)
    vision_slots, feature_width = tower.shape
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts, model.llama.vocabulary)
    language_model = LlamaForCausalLM(_llama_config(model.llama, tokenizer))
    layout = new_layout(tokenizer, method, tokens, text or Text(), vision_slots, tower.anyres, q_former_layers)
    return VocoLlama(language_model, layout, feature_width, tower, tokenizer)


def load_pretrained(uri: str, device: str = "cpu") -> VocoLlama:
    """The model of a directory that another project saved, unchanged: method none without <voco>, its own chat template."""
    with torch.random.fork_rng(devices=[]):  # drawing rows of new tokens leaves the caller's random state unchanged
        model = create_model(Model(pretrained=uri), "none", 0, None, [], seed=0)
    model.compressor = compressor_hash(own_state(model))
    return model.to(device)


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
        initializer_range=llama.width**-0.5,  # the usual 0.02 suits widths of thousands and is too small here
    )
