"""A model is asked in the words in which it was trained: those of its directory's chat template, or of its family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny
from model import llava_world as world
from model.test_foreign_files import changed_json
from model.test_layouts import apart
from transformers import AutoProcessor

import voco.model
from voco.errors import Refused
from voco.job.chat_templates import CHAT_TEMPLATES, EOS
from voco.job.config import Model, Text
from voco.model import build, weights
from voco.model.generation import prompt_ids
from voco.sequence.chat_template import end_of_answer_id, render_prompt

PARTS = (
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
VICUNA = (  # a processor's, as the LLaVA-1.5 of transformers has it: no system prompt, and no end of sequence
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}" + PARTS + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL = (  # a tokenizer's: content is a string
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_2 = MISTRAL.replace("{{ bos_token }}", "").replace("{{ '[INST] '", "{{ bos_token + '[INST] '")
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HUMAN = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def saved(folder: Path, family: str, template: str | None, file: str = "tokenizer", markers: bool = False) -> str:
    """A LLaVA on a language model of the family, with a Jinja template in one of the places where they lie."""
    uri = world.saved(world.llava(family), folder)
    tokenizer = world.tokenizer()
    if markers:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if file == "tokenizer":
        tokenizer.chat_template = template
    else:
        (folder / file).write_text(json.dumps({"chat_template": template}) if file.endswith("json") else str(template))
    tokenizer.save_pretrained(folder)
    return uri


CASES: list[tuple[str, str | None, str, bool, str]] = [
    ("mistral", None, "tokenizer", False, "mistral_instruct"),
    ("mistral", MISTRAL, "tokenizer", False, "mistral_instruct"),
    ("mistral", VICUNA, "chat_template.json", False, "vicuna_v1"),
    ("llama", None, "tokenizer", False, "vicuna_v1"),
    ("llama", VICUNA, "chat_template.json", False, "vicuna_v1"),
    ("llama", VICUNA, "processor_config.json", False, "vicuna_v1"),
    ("llama", VICUNA, "chat_template.jinja", False, "vicuna_v1"),
    ("llama", MISTRAL, "tokenizer", False, "mistral_instruct"),
    ("llama", CHATML, "tokenizer", True, "chatml"),
    ("qwen2", None, "tokenizer", True, "chatml"),
    ("qwen2", None, "tokenizer", False, "vicuna_v1"),  # chatml needs its markers
]


@pytest.mark.parametrize(("family", "template", "file", "markers", "expected"), CASES)
def test_a_llava_is_asked_in_its_own_words(
    tmp_path: Path, family: str, template: str | None, file: str, markers: bool, expected: str
) -> None:
    model = voco.model.load(saved(tmp_path, family, template, file, markers))
    assert model.layout.template == expected
    assert model.layout.eos_id == end_of_answer_id(expected, model.tokenizer)
    prompt = model.tokenizer.decode(prompt_ids(tiny.question("what?"), model.tokenizer, model.layout, has_views=True))
    parts = render_prompt(tiny.question("what?"), expected, "keep", has_views=True)
    assert prompt == "".join(part.text for part in parts)
    if expected == "mistral_instruct":
        assert prompt == "[INST] what? [/INST]"


def test_a_processors_template_comes_before_its_tokenizers(tmp_path: Path) -> None:
    uri = saved(tmp_path, "llama", MISTRAL)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": VICUNA}))
    assert voco.model.load(uri).layout.template == "vicuna_v1"


def test_llavas_own_layout_on_mistral(tmp_path: Path) -> None:
    apart(world.llava("mistral"), tmp_path, model_type="llava_mistral")
    assert voco.model.load(str(tmp_path / "llava")).layout.template == "mistral_instruct"


def created(uri: str, text: Text | None, **more: Any) -> Any:
    return build.create_model(Model(pretrained=uri, **more), "none", 0, text, [], seed=0)


def test_a_template_that_a_llava_contradicts_is_refused(tmp_path: Path) -> None:
    uri = saved(tmp_path / "a", "mistral", MISTRAL)
    message = r"text\.template: .* answers in its own chat template \(mistral_instruct\), not vicuna_v1; use mistral_instruct"
    with pytest.raises(Refused, match=message):
        created(uri, Text(template="vicuna_v1"))
    for same in ("mistral_instruct", "plain"):  # captions ask nothing
        assert created(uri, Text(template=same)).layout.template == same
    vicuna = saved(tmp_path / "b", "llama", VICUNA, "chat_template.json")
    assert created(vicuna, Text(template="released_code", newlines="strip")).layout.newlines == "strip"
    for name, template in (("c", HUMAN), ("d", LLAMA_2)):
        with pytest.raises(Refused, match=r"own chat template \(none of vicuna_v1, .*\); add it as a chat template"):
            voco.model.load(saved(tmp_path / name, "llama", template))
    with pytest.raises(Refused, match="its chat template cannot be rendered"):
        voco.model.load(saved(tmp_path / "e", "llama", "{{ raise_exception('no') }}"))


def test_a_language_model_alone_learns_the_jobs_template(tmp_path: Path) -> None:
    """Its own is the default; LLaVA-1.5 itself was trained from a model of another one."""
    apart(world.llava(), tmp_path)
    tokenizer = world.tokenizer()
    tower, lm = shapes.tower("clip", path=str(tmp_path / "tower")), str(tmp_path / "lm")
    assert created(lm, None, tower=tower).layout.template == "vicuna_v1"
    tokenizer.chat_template = MISTRAL
    tokenizer.save_pretrained(lm)
    assert created(lm, None, tower=tower).layout.template == "mistral_instruct"
    assert created(lm, Text(template="vicuna_v1"), tower=tower).layout.template == "vicuna_v1"
    tokenizer.chat_template = HUMAN
    tokenizer.save_pretrained(lm)
    with pytest.raises(Refused, match="or name one that the model will be trained in"):
        created(lm, None, tower=tower)
    assert created(lm, Text(), tower=tower).layout.template == "vicuna_v1"


def test_inst_as_one_token_is_refused(tmp_path: Path) -> None:
    """Mistral's tokenizer since version 3: its [INST] is not the text that mistral_instruct writes."""
    uri = saved(tmp_path, "mistral", MISTRAL)
    tokenizer = world.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.chat_template = MISTRAL
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="none of vicuna_v1"):
        voco.model.load(uri)
    with pytest.raises(Refused, match=r"mistral_instruct writes \[INST\], which this model's tokenizer has as a control token"):
        end_of_answer_id("mistral_instruct", tokenizer)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("newlines", ["keep", "strip"])
def test_an_export_asks_in_the_models_own_words(tmp_path: Path, template: str, newlines: str) -> None:
    """Its processor renders our prompts, with `<voco>`, and read back it has our template."""
    uri = saved(tmp_path / "theirs", "qwen2", None, markers=True)
    text = Text(template=template, newlines=newlines)  # type: ignore[arg-type]
    model = build.create_model(Model(pretrained=uri), "voco", 2, text, [], seed=0)
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "ours" / "model")
    voco.model.export(str(tmp_path / "ours"), str(tmp_path / "out"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    turns = [*tiny.question('a "quoted"\nline?', "one\ntwo {{ x }}"), *tiny.question("é\\n?")]
    for images in (0, 1, 2):
        messages = [{"role": turn["role"], "content": [{"type": "text", "text": turn["text"]}]} for turn in turns]
        messages[0]["content"] = [{"type": "image"}] * images + messages[0]["content"]  # type: ignore[operator, list-item]
        parts = render_prompt(turns, template, newlines, images > 0)
        prompt = "".join(model.tokenizer.eos_token if part == EOS else part.text for part in parts)
        got = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert got == "<image>\n<voco><voco>" * images + prompt
    if template != "plain":
        assert voco.model.load(str(tmp_path / "out")).layout.template == template


def test_a_stop_of_the_template_is_the_first_of_several(tmp_path: Path) -> None:
    uri = saved(tmp_path, "llama", CHATML, markers=True)
    changed_json(tmp_path / "generation_config.json", eos_token_id=[257, 261])
    layout = voco.model.load(uri).layout
    assert (layout.eos_id, layout.stop_ids) == (261, (257,))
