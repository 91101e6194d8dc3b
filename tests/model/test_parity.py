"""With method none the model is transformers' own LLaVA, logit for logit."""

from __future__ import annotations

import pytest
import shapes
import tiny
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from voco.model.batch import collate
from voco.model.vision.tower import CLIP, VisionTower
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import build_sample


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(3)
    text = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8
    )
    image = tiny.TOKENIZER.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, attn_implementation="eager")
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(8.0 if "q_proj" in name or "k_proj" in name else 3.0)
    return model


def own_model(reference: LlavaForConditionalGeneration) -> VocoLlama:
    """The same weights in our model: its language model, projector and tower."""
    language_model = tiny.llama(torch.float32, intermediate_size=48)
    language_model.model.load_state_dict(reference.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(reference.lm_head.state_dict())
    tower = VisionTower(shapes.tower("clip", image_size=24, layer=-2), reference.model.vision_tower, *CLIP)
    model = VocoLlama(language_model, tiny.layout("none", 2), 24, tower, tiny.TOKENIZER)
    projector = reference.model.multi_modal_projector
    model.projector[0].load_state_dict(projector.linear_1.state_dict())
    model.projector[2].load_state_dict(projector.linear_2.state_dict())
    return model.eval()


@pytest.mark.parametrize("views", [1, 2])
def test_logits_equal_llava(views):
    reference = llava()
    model = own_model(reference)
    pixels = torch.randn(views, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    features = dict(zip([f"i{v}" for v in range(views)], model.tower.encode(pixels).float(), strict=True))
    sample = build_sample("a", [tiny.question("what is it?", "a cat")], list(features), tiny.TOKENIZER, model.layout)
    batch = collate([sample], features.__getitem__, (9, 24))
    with torch.no_grad():
        expected = reference(input_ids=batch.ids, pixel_values=pixels, attention_mask=torch.ones_like(batch.ids)).logits
        got = model.logits(batch)
    assert int((batch.ids == model.layout.voco_id).sum()) == 2 * views  # <voco> is an ordinary id to both
    # our tower's output passes through fp16, as stored features do, so parity is measured before it
    assert (got - expected).abs().max() <= 2e-3 * expected.abs().max()
    exact = {name: f for name, f in zip(features, exact_features(reference, pixels), strict=True)}
    with torch.no_grad():
        got = model.logits(collate([sample], exact.__getitem__, (9, 24)))
    assert tiny.close(got, expected)


def exact_features(reference, pixels):
    with torch.no_grad():
        return reference.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def test_padded_batch_equals_llava():
    reference = llava()
    model = own_model(reference)
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    features = dict(zip(["x", "y"], exact_features(reference, pixels), strict=True))
    texts = [tiny.question("short"), tiny.question("a good deal longer than that")]
    samples = [build_sample(m, [t], [m], tiny.TOKENIZER, model.layout) for m, t in zip(["x", "y"], texts, strict=True)]
    batch = collate(samples, features.__getitem__, (9, 24))
    ids = torch.nn.utils.rnn.pad_sequence(batch.ids[0].split([len(sample) for sample in samples]), batch_first=True)
    real = torch.arange(ids.shape[1]) < torch.tensor([[len(sample)] for sample in samples])
    with torch.no_grad():
        expected = reference(input_ids=ids, pixel_values=pixels, attention_mask=real.long()).logits
        got = model.logits(batch)
    assert tiny.close(got[0], expected[real])
