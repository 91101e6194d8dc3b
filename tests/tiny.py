"""Tiny models for tests: real classes, random weights, small sizes."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import Layout

VISION_SLOTS, FEATURES = 9, 6


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, no merges: every string has a token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<pad>", "<image>", "<voco>")])
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TOKENIZER = tokenizer()


def layout(method: str = "voco", tokens: int = 2, bos: bool = True, **changes: Any) -> Layout:
    ids = {name: TOKENIZER.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "<pad>", "<image>", "<voco>")}
    fields: dict[str, Any] = {
        "method": method, "tokens": tokens, "vision_slots": VISION_SLOTS, "bos_id": ids["<s>"] if bos else None,
        "eos_id": ids["</s>"], "pad_id": ids["<pad>"], "image_id": ids["<image>"], "voco_id": ids["<voco>"],
        "separator_ids": tuple(TOKENIZER("\n", add_special_tokens=False)["input_ids"]),
        "template": "question_answer", "newlines": "keep", "q_former_layers": 2,
    }  # fmt: skip
    return Layout(**{**fields, **changes})


def llama(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Three layers with grouped queries; q and k are scaled up so that a wrong mask or position moves the logits."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(12.0 if "q_proj" in name or "k_proj" in name else 4.0)
    return model.to(dtype)


def model(method: str = "voco", tokens: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> VocoLlama:
    built = VocoLlama(llama(dtype, seed, **changes), layout(method, tokens), FEATURES, tokenizer=TOKENIZER).to(dtype)
    built.compressor = "tiny"
    with torch.no_grad():
        for weight in built.projector.parameters():
            weight.mul_(3.0)
    return built.eval()


def features(count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(VISION_SLOTS, FEATURES, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def question(text: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "text": text}]
    return turns if answer is None else [*turns, {"role": "assistant", "text": answer}]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as docs/method.md defines it."""
    a, b = a.detach(), b.detach()
    limit = 1e-10 if b.dtype == torch.float64 else 1e-5
    return bool((a - b).abs().max() <= limit * max(1.0, float(b.abs().max())))
