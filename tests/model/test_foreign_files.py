"""Directories that other projects wrote: which files count, what stands for what they leave out, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
import transformers
from model import llava_world as world
from model.test_layouts import apart, created
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor

import voco.model
from voco.errors import Refused, exit_code
from voco.model import weights
from voco.model.interop.preprocessing import CLASSES
from voco.model.vision.tower import load_tower

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 12345\n"


def changed_json(path: Path, **changes: Any) -> None:
    """The file with other values; None takes a key out."""
    facts = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))


def strays(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Files with other values of the same tensors, as older conversions leave behind, before and after in the alphabet."""
    other = {name: torch.randn_like(tensor.float()) for name, tensor in tensors.items()}
    for name in ("aaa.safetensors", "model.fp16.safetensors", "zzz.safetensors", "model-00009-of-00009.safetensors"):
        save_file(other, folder / name, {"format": "pt"})
    torch.save(other, folder / "pytorch_model-00009-of-00009.bin")
    (folder / "old.bin").write_text("no weights")


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_only_the_files_that_are_named_are_the_model(tmp_path: Path, shards: str) -> None:
    reference = world.llava()
    uri = world.saved(reference, tmp_path, shards=shards)
    features = created(uri).tower(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    strays(tmp_path, {name: tensor for path in tmp_path.glob("model*.safetensors") for name, tensor in load_file(path).items()})
    model = created(uri)
    world.assert_same_logits(model, reference)
    assert torch.equal(model.tower(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)), features)


def test_only_the_named_files_of_llavas_own_layout(tmp_path: Path) -> None:
    """A safetensors file beside pickled shards that an index names is not the model's projector."""
    reference = world.llava()
    apart(reference, tmp_path)
    projector = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    save_file({name: torch.randn_like(t) for name, t in projector.items()}, tmp_path / "llava" / "mm.safetensors")
    torch.save({name: torch.randn_like(t) for name, t in projector.items()}, tmp_path / "llava" / "pytorch_model-99.bin")
    world.assert_same_logits(created(str(tmp_path / "llava")), reference)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


SHARD = "model-00002-of"


def shard(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith(SHARD))


def adapter(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "peft_type": "LORA"})
    )


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


BROKEN = {
    "missing shard": (lambda folder: shard(folder).unlink(), rf"lacks {SHARD}.*safetensors, which model.safetensors.index.json"),
    "cut shard": (lambda folder: cut(shard(folder)), rf"{SHARD}.* is cut: expected \d+ bytes, got \d+; download it again"),
    "header cut": (lambda folder: shard(folder).write_bytes(b"\x10"), rf"{SHARD}.* no complete safetensors header"),
    "pointer": (lambda folder: shard(folder).write_text(POINTER), rf"{SHARD}.* is a git-lfs pointer .* run `git lfs pull`"),
    "pointer index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(POINTER),
        r"model\.safetensors\.index\.json is a git-lfs pointer",
    ),
    "empty index": (
        lambda folder: changed_json(folder / "model.safetensors.index.json", weight_map=None),
        r"index\.json names no file",
    ),
    "outside": (
        lambda folder: changed_json(folder / "model.safetensors.index.json", weight_map={"a": "../other.safetensors"}),
        "not inside the directory",
    ),
    "no weights": (
        lambda folder: [os.rename(path, folder / f"x-{path.name}") for path in folder.glob("model*")],
        r"holds no weights: expected one of model\.safetensors, .*, got x-model-00001",
    ),
    "lora": (adapter, r"holds a LoRA \(adapter_config\.json\).* merge it into lmsys/vicuna-7b-v1\.5"),
    "config pointer": (lambda folder: (folder / "config.json").write_text(POINTER), r"config\.json.* git-lfs pointer"),
    "config cut": (lambda folder: cut(folder / "config.json"), r"config\.json.* no JSON"),
    "no model type": (lambda folder: changed_json(folder / "config.json", model_type=None), "does not say what the model is"),
    "no tokenizer": (no_tokenizer, r"holds no tokenizer: expected tokenizer\.json, or tokenizer\.model, or vocab\.json with"),
    "tokenizer pointer": (lambda folder: (folder / "tokenizer.json").write_text(POINTER), r"tokenizer\.json is a git-lfs"),
    "tokenizer cut": (lambda folder: cut(folder / "tokenizer.json"), "its tokenizer cannot be read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    world.saved(world.llava(), folder, shards="20KB")
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_not_there_are_refused_with_what_to_do(sharded: Path, tmp_path: Path, case: str) -> None:
    damage, message = BROKEN[case]
    folder = tmp_path / "llava"
    shutil.copytree(sharded, folder)
    damage(folder)
    with pytest.raises(Refused, match=message) as refused:
        voco.model.load(str(folder))
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_qwen_without_tokenizer_would_have_had_an_empty_one(tmp_path: Path) -> None:
    """transformers makes a tokenizer of one token, without a word."""
    world.TEXT["qwen2"].save_pretrained(tmp_path)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path, config=world.TEXT["qwen2"])) == 1
    uri = world.saved(world.llava("qwen2"), tmp_path)
    no_tokenizer(tmp_path)
    assert exit_code(lambda: len([voco.model.load(uri)])) == 2


def test_pickled_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    apart(world.llava(), tmp_path)
    llava, second = tmp_path / "llava", tmp_path / "llava" / "pytorch_model-00002-of-00002.bin"
    whole = second.read_bytes()
    for damage, message in (
        (lambda: cut(second), "00002-of-00002.bin is cut at"),
        (lambda: second.write_bytes(b""), "00002-of-00002.bin is cut at 0 bytes"),
        (lambda: second.write_text(POINTER), "00002-of-00002.bin is a git-lfs pointer"),
        (second.unlink, "lacks pytorch_model-00002-of-00002.bin, which pytorch_model.bin.index.json names"),
    ):
        second.write_bytes(whole)
        damage()
        with pytest.raises(Refused, match=message):
            created(str(llava))
    torch.save(torch.load(tmp_path / "mm_projector.bin", weights_only=True), second, _use_new_zipfile_serialization=False)
    world.assert_same_logits(created(str(llava)), world.llava())  # torch's files of before 1.6
    cut(second)
    with pytest.raises(Refused, match="cannot be read"):
        created(str(llava))


def test_a_tower_and_a_projector_that_are_not_there_are_refused(tmp_path: Path) -> None:
    apart(world.llava(), tmp_path)
    tower, lm = shapes.tower("clip", path=str(tmp_path / "tower")), str(tmp_path / "lm")
    projector = tmp_path / "mm_projector.safetensors"
    cut(projector)
    with pytest.raises(Refused, match=r"mm_projector\.safetensors: is cut or damaged"):
        created(lm, tower=tower, projector=str(projector))
    projector.write_text(POINTER)
    with pytest.raises(Refused, match=r"mm_projector\.safetensors: is a git-lfs pointer"):
        created(lm, tower=tower, projector=str(projector))
    cut(tmp_path / "tower" / "model.safetensors")
    with pytest.raises(Refused, match=r"tower\.path: .* model\.safetensors is cut"):
        created(lm, tower=tower)


def test_a_tower_of_another_shape_or_layer_is_refused(tmp_path: Path) -> None:
    apart(world.llava(), tmp_path)
    path, uri = str(tmp_path / "tower"), world.saved(world.llava(), tmp_path / "whole")
    for layer in (-5, 4):
        with pytest.raises(Refused, match=rf"tower\.layer: expected -4 to 3 for the 3 layers of .*, got {layer}"):
            load_tower(shapes.tower("clip", path=path, layer=layer))
    assert load_tower(shapes.tower("clip", path=path, layer=-4)).shape == (16, 24)
    changed_json(tmp_path / "tower" / "config.json", intermediate_size=40)
    with pytest.raises(
        Refused, match=r"tower\.path: .*: expected .*mlp.fc1.bias of shape \(40,\), as config\.json says, got \(32,\)"
    ):
        load_tower(shapes.tower("clip", path=path, layer=-2))
    vision = json.loads((tmp_path / "whole" / "config.json").read_text())["vision_config"]
    changed_json(tmp_path / "whole" / "config.json", vision_config={**vision, "num_hidden_layers": 4})
    with pytest.raises(Refused, match=r"tower\.path: .* does not hold the tower of its config\.json: .*layers\.3") as refused:
        load_tower(shapes.tower("clip", path=uri, layer=-2))
    assert "\n" not in str(refused.value)


def test_what_a_config_leaves_out_is_transformers_default(tmp_path: Path) -> None:
    reference = world.llava()
    uri = world.saved(reference, tmp_path)
    changed_json(tmp_path / "config.json", vision_feature_layer=None, vision_feature_select_strategy=None)
    vision = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    changed_json(tmp_path / "config.json", vision_config={key: value for key, value in vision.items() if key != "model_type"})
    model = created(uri)
    world.assert_same_logits(model, LlavaForConditionalGeneration.from_pretrained(uri).eval())
    world.assert_same_logits(model, reference)
    assert model.tower.config["layer"] == LlavaConfig().vision_feature_layer == -2
    pixels = world.pixels(1)
    features = model.tower.encode(pixels).float()
    assert torch.allclose(features, torch.stack(world.exact_features(reference, pixels)), rtol=1e-3, atol=1e-3)


def test_a_tower_of_defaults_alone_is_transformers_own(tmp_path: Path) -> None:
    """Shapes that a vision_config leaves out are those of CLIP's class, not of LLaVA's own tower."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=12 // 3)
    config = LlavaConfig(vision_config=vision, text_config=world.TEXT["llama"], image_token_index=259)
    reference = world.loud(LlavaForConditionalGeneration(config))
    uri = world.saved(reference, tmp_path)
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    changed_json(tmp_path / "config.json", vision_config={key: getattr(vision, key) for key in kept})
    processor = LlavaImageProcessor(do_pad=True)  # 224 pixels, as the class has it
    processor.save_pretrained(tmp_path)
    model = created(uri)
    assert (model.tower.size, model.tower.shape) == (224, (49, 32))
    back = LlavaForConditionalGeneration.from_pretrained(uri).eval()
    picture = Image.fromarray(torch.randint(0, 255, (30, 50, 3), dtype=torch.uint8, generator=torch.manual_seed(1)).numpy())
    expected = world.exact_features(back, processor(picture, return_tensors="pt")["pixel_values"])[0]
    got = model.tower(model.tower.preprocess(picture)[None])[0].float()
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


OPTIONS = [
    ({"do_normalize": False}, "do_normalize of its image processor: expected True, got False"),
    ({"do_rescale": False}, "do_rescale .* expected True, got False"),
    ({"do_resize": False}, "do_resize .* expected True, got False"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor .* expected 1/255, got 0.0078"),
    ({"resample": 2}, "resample .* expected 3, got 2"),
    ({"crop_size": {"height": 16, "width": 16}}, "crop_size .* expected 32, the tower's, got .*16"),
    ({"crop_size": 16}, "crop_size .* expected 32, the tower's, got 16"),
    ({"crop_size": None}, "crop_size .* expected 32, the tower's, got .*224"),
    ({"size": {"shortest_edge": 64}}, "size .* expected 32, the tower's, got .*64"),
    ({"size": {"longest_edge": 32}}, "size .* expected 32, the tower's, got .*longest_edge"),
    ({"size": None}, "size .* expected 32, the tower's, got .*224"),
    ({"image_processor_type": "ViTImageProcessor"}, "expected an image processor of CLIP, .* got ViTImageProcessor"),
]


@pytest.mark.parametrize(("changes", "message"), OPTIONS, ids=str)
def test_a_processor_that_would_give_other_pixels_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    uri = world.saved(world.llava(), tmp_path)
    changed_json(tmp_path / "preprocessor_config.json", **changes)
    with pytest.raises(Refused, match=message):
        created(uri)
    with pytest.raises(Refused, match=message):
        load_tower(shapes.tower("clip", path=uri))


def test_mean_and_std_are_the_processors_and_a_nested_one_comes_first(tmp_path: Path) -> None:
    uri = world.saved(world.llava(), tmp_path)
    changed_json(tmp_path / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], size=32, crop_size=32)  # as old files say it
    assert created(uri).tower.mean == (0.1, 0.2, 0.3)
    changed_json(tmp_path / "preprocessor_config.json", image_mean=None)
    assert created(uri).tower.mean == tuple(CLASSES["CLIP"]["image_mean"])
    nested = {**world.processor("clip").to_dict(), "image_mean": [0.4, 0.4, 0.4]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested, "processor_class": "LlavaProcessor"}))
    assert transformers.AutoImageProcessor.from_pretrained(uri).image_mean == (0.4, 0.4, 0.4)
    assert created(uri).tower.mean == (0.4, 0.4, 0.4)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_transformers_classes(name: str) -> None:
    options = getattr(transformers, f"{name}ImageProcessor")().to_dict()
    for key, value in CLASSES[name].items():
        got = options.get(key) or False
        assert (list(got) if isinstance(got, tuple) else got) == value, key
    assert (options["resample"], options["do_normalize"], options["do_rescale"], options["do_resize"]) == (3, True, True, True)
    assert options["rescale_factor"] == pytest.approx(1 / 255)


def test_tokens_around_an_image_are_refused(tmp_path: Path) -> None:
    apart(world.llava(), tmp_path, mm_use_im_start_end=True)
    with pytest.raises(Refused, match="mm_use_im_start_end True; only False is supported"):
        created(str(tmp_path / "llava"))


def with_several_ends(folder: Path) -> str:
    """A LLaVA saved to stop at four ids, as Llama 3 and Qwen list several: three control tokens and a word."""
    uri = world.saved(world.llava(), folder)
    tokenizer = world.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.save_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|eot|>")) == (257, 258, 260)
    changed_json(folder / "generation_config.json", eos_token_id=[257, 260, 258, 2])
    return uri


@pytest.mark.parametrize("end", [257, 260, 258])  # the last is the padding too, as <|endoftext|> is Qwen's
def test_an_answer_ends_at_every_end_of_sequence(tmp_path: Path, end: int) -> None:
    model = voco.model.load(with_several_ends(tmp_path))
    steps = itertools.count()

    def at_the_third_step(module: Any, inputs: Any, logits: torch.Tensor) -> None:
        if next(steps) >= 2:
            logits[..., end] += 1e6

    model.language_model.lm_head.register_forward_hook(at_the_third_step)
    (ids,) = model.answer_ids([None], [[256, 65, 10]], 6)
    assert len(ids) == 2


def test_every_end_of_sequence_survives_training_and_export(tmp_path: Path) -> None:
    model = voco.model.load(with_several_ends(tmp_path / "theirs"))
    assert (model.layout.eos_id, model.layout.end_ids) == (257, (257, 260, 258)), "a word ends no answer"
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "ours" / "model")
    assert voco.model.load(str(tmp_path / "ours")).layout == model.layout
    voco.model.export(str(tmp_path / "ours"), str(tmp_path / "out"))
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [257, 260, 258]
    assert voco.model.load(str(tmp_path / "out")).layout.end_ids == (257, 260, 258)
