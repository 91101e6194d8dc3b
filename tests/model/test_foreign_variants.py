"""Some of the list of `bench/checkpoint_variants.py`: each equal to transformers, or refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from model.foreign_outcome import EQUAL, FAULT, REFUSED, outcome
from model.foreign_variants import VARIANTS, Variant

NAMES = {
    "tied True, of its text True, with a head": EQUAL,
    "tied False, of its text True, without a head": EQUAL,
    "rope_scaling as before transformers 5": EQUAL,
    "Qwen2, sliding window in upper layers": EQUAL,
    "image_token_index of a letter": EQUAL,
    "names of weights as in memory": EQUAL,
    "a tokenizer without <image> and padding": EQUAL,
    "a layer that the tower lacks": REFUSED,
    "sliding window shorter than the prompt": REFUSED,
    "quantized by gptq": REFUSED,
    "a weight of another shape": REFUSED,
    "model_type other": REFUSED,
}
BY_NAME = {variant.name: variant for variant in VARIANTS}


def test_every_name_is_there_once() -> None:
    assert len(BY_NAME) == len(VARIANTS) > 100


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_equal_or_refused(tmp_path: Path, name: str) -> None:
    result, text = outcome(BY_NAME[name], tmp_path)
    assert result == NAMES[name], text


def test_what_is_not_expected_is_a_fault(tmp_path: Path) -> None:
    equal, refused = BY_NAME["LLaVA-1.6 on llama"], BY_NAME["quantized by gptq"]
    for number, variant in enumerate((Variant("a", equal.write, "some line"), Variant("b", refused.write))):
        (tmp_path / str(number)).mkdir()
        assert outcome(variant, tmp_path / str(number))[0] == FAULT
