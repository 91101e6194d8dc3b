"""LLaVA-1.6 as transformers saves it: under `none` its own pixels, packing and logits; under `voco` each tile is a view."""

from __future__ import annotations

import numpy as np
import pytest
import shapes
import tiny
import torch
from model import llava_world as world
from model.test_equality import read_logits
from PIL import Image
from transformers import AutoProcessor, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import voco.model
from voco.errors import Refused
from voco.job.config import Model, Text
from voco.model import build, weights
from voco.model.batch import collate
from voco.model.vision.tower import load_tower
from voco.sequence.sequence import TEXT, build_sample

PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
SHAPES = [(50, 50), (64, 20), (20, 90), (31, 40), (130, 100)]  # (height, width): 2x2, tall, wide, small, large

WIDER = {"mistral": {"sliding_window": 512}}  # two images with their complete prefixes fit


def next_llava(text: str = "llama", seed: int = 3) -> LlavaNextForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=world.TOWERS["clip"][0],
        text_config=type(world.TEXT[text])(**{**world.TEXT[text].to_dict(), **WIDER.get(text, {})}),
        image_token_index=259,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=world.TEXT[text].tie_word_embeddings,
    )
    model = world.loud(LlavaNextForConditionalGeneration(config))
    with torch.no_grad():
        model.model.image_newline.normal_(0.0, 1.0)
    return model


def processor() -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    soft = Image.fromarray(draw.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return soft.resize((width, height), Image.Resampling.BICUBIC)


def created(uri, method="none", tokens=0, **more):
    layers = 2 if method == "q_former" else 0
    return build.create_model(Model(pretrained=uri, **more), method, tokens, Text(template="question_answer"), [], 0, layers)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def pair(request, tmp_path_factory):
    reference = next_llava(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    uri = world.saved(reference, folder)
    processor().save_pretrained(folder)
    return reference, uri


def exact_features(reference, pixels):
    """(T, V, C) fp32 of one image's normalised tiles, before our rounding to fp16."""
    with torch.no_grad():
        return reference.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def tiles_and_features(model, reference, shapes):
    """Our tiles of each image, normalised, their features, and the images' sizes."""
    tiles_and_sizes = [model.tower.tiles(picture(*shape, seed)) for seed, shape in enumerate(shapes)]
    normalised = [model.tower.normalise(tiles) for tiles, _ in tiles_and_sizes]
    return normalised, [exact_features(reference, normal) for normal in normalised], [size for _, size in tiles_and_sizes]


def one_pass(model, samples, store):
    batch = collate(samples, store.__getitem__, (16, 24)).to("cpu", model.dtype)
    with torch.no_grad():
        logits = model.logits(batch)
    return [logits[(batch.sample == index) & (batch.kind == TEXT)] for index in range(len(samples))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_are_the_processors_own(pair, shape):
    model = created(pair[1])
    tiles, size = model.tower.tiles(picture(*shape))
    expected = processor()(picture(*shape), do_rescale=False, do_normalize=False, return_tensors="pt")
    assert size == tuple(expected["image_sizes"][0].tolist()) == shape
    assert torch.equal(tiles.permute(0, 3, 1, 2), expected["pixel_values"][0].to(torch.uint8))
    normal = processor()(picture(*shape), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(model.tower.normalise(tiles), normal, atol=1e-5)
    assert torch.equal(model.tower.preprocess(picture(*shape)), tiles[0])  # a frame is the complete image without tiles


@pytest.mark.parametrize("shapes", [[shape] for shape in SHAPES] + [SHAPES[:2]], ids=str)
def test_under_none_logits_are_transformers_own(pair, shapes):
    reference, uri = pair
    model = created(uri)
    pixels, features, sizes = tiles_and_features(model, reference, shapes)
    names = [f"i{index}" for index in range(len(shapes))]
    sample = build_sample("a", [tiny.question("what is it?", "a cat")], names, model.tokenizer, model.layout, sizes=sizes)
    ids = torch.from_numpy(sample.ids)[None]
    padded = torch.zeros(len(shapes), max(map(len, pixels)), 3, 32, 32)
    for index, normal in enumerate(pixels):
        padded[index, : len(normal)] = normal
    inputs = {"pixel_values": padded, "image_sizes": torch.tensor(sizes), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = reference(input_ids=ids, **inputs).logits[0][torch.from_numpy(sample.kinds) == TEXT][:, : world.KNOWN]
    (got,) = one_pass(model, [sample], dict(zip(names, features, strict=True)))
    assert expected.abs().max() > 0.5
    assert tiny.close(got[:, : world.KNOWN], expected)
    with torch.no_grad():
        model.image_newline.add_(1.0)
    (moved,) = one_pass(model, [sample], dict(zip(names, features, strict=True)))
    assert (moved - got).abs().max() > 1e-2  # the newlines are in the sequence


def test_images_of_several_shapes_in_one_batch_are_as_each_alone(pair):
    reference, uri = pair
    model = created(uri)
    _, features, sizes = tiles_and_features(model, reference, SHAPES)
    store = {f"i{index}": image for index, image in enumerate(features)} | {"frame": features[0][0]}
    turns = [tiny.question("what is it?", "a cat")]
    samples = [
        build_sample("a", turns, [f"i{index}"], model.tokenizer, model.layout, sizes=[sizes[index]])
        for index in range(len(features))
    ]
    samples += [
        build_sample("t", turns, [], model.tokenizer, model.layout),
        build_sample("f", turns, ["frame"], model.tokenizer, model.layout),
    ]
    together = one_pass(model, samples, store)
    for sample, got in zip(samples, together, strict=True):
        assert tiny.close(got, one_pass(model, [sample], store)[0])
    with pytest.raises(ValueError, match="expected features of 5 tiles, got 3"):
        one_pass(model, samples[:1], {"i0": features[1]})


@pytest.mark.parametrize(("method", "tokens"), [("voco", 2), ("none", 2), ("avg_pool", 4), ("q_former", 4)])
def test_compress_then_read_equals_one_pass(pair, method, tokens):
    reference, uri = pair
    model = created(uri, method, tokens)
    _, features, sizes = tiles_and_features(model, reference, SHAPES[:2])
    names = [f"i{index}" for index in range(len(features))]
    sample = build_sample("v", [tiny.question("which came first?")], names, model.tokenizer, model.layout, sizes=sizes)
    (cache,) = model.compress_features([features], sizes=[sizes])
    if method == "voco":  # 2x2 and 2x1 tiles, and each complete image
        assert cache.tokens == (tokens,) * (5 + 3)
    (expected,) = one_pass(model, [sample], dict(zip(names, features, strict=True)))
    assert tiny.close(read_logits(model, cache, sample.ids[sample.kinds == TEXT].tolist()), expected)
    images = [picture(*size, index) for index, size in enumerate(sizes)]
    again = model.compress_images(images)
    assert (again.tokens, again.keys.shape) == (cache.tokens, cache.keys.shape)


def test_survives_save_and_load_bit_by_bit(pair, tmp_path):
    _, uri = pair
    model = created(uri, "none", 2)
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "model")
    loaded = voco.model.load(str(tmp_path))
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert "image_newline" in before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.layout == model.layout
    assert [list(size) for size in loaded.layout.anyres.grid_pinpoints] == PINPOINTS
    assert weights.read_config(str(tmp_path))["layout"]["anyres"] == {"grid_pinpoints": PINPOINTS, "tile": 32}
    assert loaded.tower.identity == model.tower.identity == loaded.preprocessing


def test_impossible_towers_are_refused(pair):
    _, uri = pair
    plain = shapes.tower("clip", path=uri, layer=-2)
    with pytest.raises(Refused, match=r"model\.tower\.grid_pinpoints: expected \[\[32, 64\]"):
        created(uri, tower=plain)
    tower = load_tower(plain)
    assert tower.identity != created(uri).tower.identity
    for changes, message in (({"grid_pinpoints": [[32, 50]]}, "multiples of image_size"), ({"decoder": "fast"}, "decoder pil")):
        with pytest.raises(ValueError, match=message):
            Model(pretrained=uri, tower={**plain, "grid_pinpoints": PINPOINTS, **changes})


@pytest.mark.parametrize(("method", "tokens"), [("none", 0), ("voco", 1)])
def test_exported_it_is_transformers_own(pair, tmp_path, method, tokens):
    """`from_pretrained` of the export gives the logits of the model that was read, and its processor gives ids and pixels."""
    reference, uri = pair
    model = created(uri, method, tokens)
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "ours" / "model")
    dropped = voco.model.export(str(tmp_path / "ours"), str(tmp_path / "out"))
    assert any("mask" in line for line in dropped) == (method == "voco")
    back, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=picture(64, 20), text="<image>\nwhat?\n", return_tensors="pt")
    tiles, _ = model.tower.tiles(picture(64, 20))
    assert torch.allclose(inputs["pixel_values"][0], model.tower.normalise(tiles), atol=1e-5)
    with torch.no_grad():
        expected = reference(**inputs).logits[..., : world.KNOWN]
        got = back.eval()(**inputs).logits[..., : world.KNOWN]
    assert expected.abs().max() > 0.5
    assert tiny.close(got, expected)
