"""What becomes of a directory of `foreign_variants.py`: equal to transformers, refused with a line, or a fault."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from model.foreign_variants import Variant
from model.test_directory_template import both_prompts
from model.test_llava_next import one_pass, picture

import voco.model
from voco.errors import Refused
from voco.job.chat_templates import CHAT_TEMPLATES
from voco.model.generation import prompt_ids
from voco.model.interop.directory_template import directory_template
from voco.model.interop.llava_import import LLAVAS
from voco.model.rope import max_positions
from voco.sequence.sequence import TEXT, build_sample

SIDE = 50  # of the image: square, because transformers' processors of LLaVA-1.5 crop others where LLaVA pads
PIXELS, FEATURES = 1e-5, 1e-3  # largest differences; features are rounded to fp16
EQUAL, REFUSED, FAULT = "equal", "refused", "FAULT"


def outcome(variant: Variant, folder: Path) -> tuple[str, str]:
    """`equal` with the largest difference, `refused` with the line, or `FAULT` with what is wrong."""
    uri, reference = variant.write(folder)
    try:
        text = compare(uri, reference)
    except Refused as error:
        if variant.refused is None or not re.search(variant.refused, str(error)) or "\n" in str(error):
            return FAULT, f"refused: {error}"
        return REFUSED, str(error)
    except Exception as error:  # noqa: BLE001 a fault of any kind is a line of the list
        where = traceback.extract_tb(error.__traceback__)[-1]
        return FAULT, f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error}"
    return (FAULT, f"read, though it should be refused: {text}") if variant.refused is not None else (EQUAL, text)


def compare(uri: str, reference: Any) -> str:
    """The largest difference of a logit. Raises Refused as our reader does, and AssertionError for whatever differs."""
    model = voco.model.load(uri).float()
    in_transformers = reference is None
    if in_transformers:
        kind = LLAVAS[transformers.AutoConfig.from_pretrained(uri).model_type]
        reference = kind.from_pretrained(uri, dtype=torch.float32).eval()
    image = picture(SIDE, SIDE)
    tiles, size = model.tower.tiles(image)
    pixels = model.tower.normalise(tiles)
    if in_transformers and has_processor(uri):
        processor = transformers.AutoImageProcessor.from_pretrained(uri)
        expected = processor(image, return_tensors="pt")["pixel_values"].reshape(pixels.shape)
        assert (pixels - expected).abs().max() <= PIXELS, f"pixels differ by {float((pixels - expected).abs().max()):.2g}"
    exact = exact_features(reference, pixels)
    largest = float(exact.abs().max())
    differ = float((model.tower.encode(pixels).float() - exact).abs().max())
    assert differ <= FEATURES * max(1.0, largest), f"features of up to {largest:.2g} differ by {differ:.2g}"
    check_words(model, uri, reference)
    return check_logits(model, uri, reference, pixels, exact, size)


def has_processor(uri: str) -> bool:
    return any("image_processor" in path.read_text() for path in Path(uri).glob("*processor_config.json"))


def exact_features(reference: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(T, V, C) fp32 of normalised tiles as transformers' LLaVA selects them, before our rounding to fp16."""
    with torch.no_grad():
        states = reference.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    states = states[reference.config.vision_feature_layer]
    return states[:, 1:] if reference.config.vision_feature_select_strategy == "default" else states


def check_words(model: Any, uri: str, reference: Any) -> None:
    """The prompt is what the directory's template writes, and generation ends where transformers' does."""
    template = directory_template(uri, model.tokenizer)
    if template is not None:
        own, directory = ("".join(prompt.split()) for prompt in both_prompts(model, template))
        default = CHAT_TEMPLATES[model.layout.template].default_system if model.layout.system is None else ""
        assert own in (directory, "".join(default.split()) + directory), f"asks {own!r}, not {directory!r}"
    ends = reference.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    controls = set(ends) & model.tokenizer.added_tokens_decoder.keys()
    assert controls <= {*model.layout.end_ids}, f"ends at {model.layout.end_ids}, not at {sorted(controls)}"


def refused_answer(model: Any, features: torch.Tensor) -> str:
    """Raises Refused with the line of the reader, which takes no prompt longer than the positions in which it is exact."""
    prompt = prompt_ids(tiny.question("what is it?"), model.tokenizer, model.layout, has_views=True)
    try:
        model.answer_ids(model.compress_features([[*features]]), [prompt], 1)
    except ValueError as error:
        raise Refused(str(error)) from error
    return "answers a prompt that is too long"


def check_logits(model: Any, uri: str, reference: Any, pixels: torch.Tensor, features: torch.Tensor, size: Any) -> str:
    """The largest difference of the logits of all text after the image, and the size of the logits."""
    turns = [tiny.question("what is it?", "a cat")]
    sample = build_sample("a", turns, ["i"], model.tokenizer, model.layout, sizes=[size])
    positions = max_positions(model.language_model.config.to_dict())
    if len(sample) > positions:
        return refused_answer(model, features)
    image_token = getattr(reference.config, "image_token_id", None) or reference.config.image_token_index
    ids = torch.from_numpy(np.where(sample.ids == model.layout.image_id, image_token, sample.ids))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if size is not None:
        inputs |= {"pixel_values": pixels[None], "image_sizes": torch.tensor([size])}
    with torch.no_grad():
        expected = reference(**inputs).logits[0][torch.from_numpy(sample.kinds) == TEXT]
    (got,) = one_pass(model, [sample], {"i": features if size is not None else features[0]})
    known = len(transformers.AutoTokenizer.from_pretrained(uri))  # the rows after them are drawn again, for `<voco>`
    got, expected = got[:, :known], expected[:, :known]
    largest = float(expected.abs().max())
    differ = float((got - expected).abs().max())
    assert largest > 0.5, "logits near zero prove nothing"
    assert tiny.close(got, expected), f"logits of up to {largest:.2g} differ by {differ:.2g}"
    return f"{differ:.1e} of {largest:.2g}"
