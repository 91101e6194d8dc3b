"""Tiny random LLaVAs as transformers itself builds and saves them, over every family of language models and towers."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
TEXT = {
    "llama": LlamaConfig(vocab_size=261, **SIZES),  # 261 rows: no multiple of 64
    "tied": LlamaConfig(vocab_size=320, tie_word_embeddings=True, **SIZES),
    "mistral": MistralConfig(vocab_size=261, sliding_window=128, **SIZES),
    "qwen2": Qwen2Config(vocab_size=400, tie_word_embeddings=True, **SIZES),  # more rows than the tokenizer has tokens
    "qwen3": Qwen3Config(vocab_size=261, head_dim=16, **SIZES),  # wider heads than width / heads, and key norms
}
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
TOWERS = {
    "clip": (CLIPVisionConfig(image_size=32, projection_dim=16, **VISION), "default"),
    "siglip": (SiglipVisionConfig(image_size=32, **VISION), "full"),
}


KNOWN = 260  # tokens of the tokenizer; the rows after them are drawn again, for `<voco>`


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level with `<image>` and without `<voco>`; with `bos` it puts BOS before every text, as Vicuna's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<pad>", "<image>")])
    if bos:
        byte_level.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Weights scaled so that a wrong mask or position moves the logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(8.0 if "q_proj" in name or "k_proj" in name else 3.0)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)  # all ones would hide a norm that is left out
            else:
                weight.normal_(0.0, 0.1)
    return model.eval()


def llava(text: str = "llama", tower: str = "clip", seed: int = 3) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision, strategy = TOWERS[tower]
    config = LlavaConfig(
        vision_config=vision, text_config=TEXT[text], image_token_index=259, vision_feature_select_strategy=strategy
    )
    return loud(LlavaForConditionalGeneration(config))


def processor(tower: str):
    if tower == "siglip":
        return SiglipImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.5, 0.4, 0.3])
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def saved(model: LlavaForConditionalGeneration, folder: Path, tower: str = "clip", shards: str = "5GB", bos: bool = True) -> str:
    model.save_pretrained(folder, max_shard_size=shards)
    tokenizer(bos).save_pretrained(folder)
    processor(tower).save_pretrained(folder)
    return str(folder)


def pixels(views: int, seed: int = 0) -> torch.Tensor:
    """Normalised (views, 3, 32, 32), as both models' towers take them."""
    return torch.randn(views, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def exact_features(reference: LlavaForConditionalGeneration, images: torch.Tensor) -> list[torch.Tensor]:
    """The projector's input for each image, without our rounding to fp16, which would hide small differences."""
    with torch.no_grad():
        states = reference.model.vision_tower(images, output_hidden_states=True).hidden_states
    states = states[reference.config.vision_feature_layer]
    return list(states[:, 1:] if reference.config.vision_feature_select_strategy == "default" else states)


def assert_same_logits(model, reference: LlavaForConditionalGeneration, views: int = 1) -> None:
    """Our logits of text after `views` images are transformers' own, method none, fp32."""
    from model.test_equality import one_pass_logits

    from voco.sequence.sequence import TEXT as TEXT_KIND
    from voco.sequence.sequence import build_sample

    images = pixels(views)
    turns = tiny.question("what is it?", "a cat")
    sample = build_sample("a", [turns], [f"i{view}" for view in range(views)], model.tokenizer, model.layout)
    ids, positions = torch.from_numpy(sample.ids)[None], torch.from_numpy(sample.position)
    assert torch.equal(positions, torch.arange(len(sample)))
    with torch.no_grad():
        expected = reference(input_ids=ids, pixel_values=images, attention_mask=torch.ones_like(ids)).logits[0]
        got = one_pass_logits(model, [sample], [exact_features(reference, images)])[(0, 0)]
    expected = expected[torch.from_numpy(sample.kinds) == TEXT_KIND][:, :KNOWN]
    assert expected.abs().max() > 0.5  # near-zero logits would prove nothing
    assert tiny.close(got[:, :KNOWN], expected)
