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
from voco.job.chat_templates import CHAT_TEMPLATES, EOS, RELEASED_SYSTEM, VICUNA_SYSTEM
from voco.job.config import Model, Text
from voco.job.load import build_job
from voco.job.run_id import hashed_content
from voco.model import build, weights
from voco.model.generation import prompt_ids
from voco.sequence.chat_template import end_of_answer_id, render_prompt
from voco.train.initial_model import initial_model

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
QWEN_2 = CHATML.replace("You help.", "You are a helpful assistant.")
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
DATED = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_3_1 = LLAMA_3.replace(
    "{{ bos_token }}",
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n" + DATED.replace("\n", "\\n") + "<|eot_id|>' }}",
)
MARKERS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
HUMAN = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def saved(
    folder: Path, family: str, template: str | None, file: str = "tokenizer", markers: bool = False, model: bool = True
) -> str:
    """A LLaVA on a language model of the family, with a Jinja template in one of the places where they lie.

    Without `model` its weights and configuration are there already.
    """
    if model:
        world.saved(world.llava(family), folder)
    tokenizer = world.tokenizer()
    if markers:
        tokenizer.add_special_tokens({"additional_special_tokens": [*MARKERS]})
    if file == "tokenizer":
        tokenizer.chat_template = template
    else:
        (folder / file).write_text(json.dumps({"chat_template": template}) if file.endswith("json") else str(template))
    tokenizer.save_pretrained(folder)
    return str(folder)


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
    parts = render_prompt(tiny.question("what?"), expected, "keep", True, "You help." if template == CHATML else None)
    assert prompt == "".join(part.text for part in parts)
    if expected == "mistral_instruct":
        assert prompt == "[INST] what? [/INST]"


def test_a_processors_template_comes_before_its_tokenizers(tmp_path: Path) -> None:
    uri = saved(tmp_path, "llama", MISTRAL)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": VICUNA}))
    assert voco.model.load(uri).layout.template == "vicuna_v1"


# family, the directory's template, ours, and the system prompt that is taken over: None where it writes none or ours
SYSTEMS: list[tuple[str, str, str, str | None]] = [
    ("llama", VICUNA, "vicuna_v1", None),
    ("llama", VICUNA_SYSTEM + " " + VICUNA, "vicuna_v1", None),
    ("llama", RELEASED_SYSTEM + " " + VICUNA, "released_code", None),
    ("llama", "Be brief. " + VICUNA, "vicuna_v1", "Be brief."),
    ("llama", "{{ bos_token }}Be\nbrief. " + VICUNA, "vicuna_v1", "Be\nbrief."),
    ("qwen2", QWEN_2, "chatml", "You are a helpful assistant."),
    ("qwen2", QWEN_2.replace("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", ""), "chatml", None),
    ("llama", LLAMA_3, "llama_3", None),
    ("llama", LLAMA_3_1, "llama_3", DATED),
    ("mistral", MISTRAL, "mistral_instruct", None),
]


def both_prompts(model: Any, template: str) -> tuple[str, str]:
    """The text of our prompt without an image, and what the directory's template makes of the same turn, without BOS."""
    ids = prompt_ids(tiny.question("what?"), model.tokenizer, model.layout, has_views=False)
    parts = [{"type": "text", "text": "what?"}] if template.endswith(VICUNA) else "what?"
    turns = [{"role": "user", "content": parts}]
    directory = model.tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
    return model.tokenizer.decode(ids).removeprefix("<s>"), directory.removeprefix("<s>")


@pytest.mark.parametrize(("family", "template", "expected", "system"), SYSTEMS)
def test_a_system_prompt_is_taken_over(tmp_path: Path, family: str, template: str, expected: str, system: str | None) -> None:
    """And survives saving, continued training and export."""
    model = voco.model.load(saved(tmp_path / "theirs", family, template, markers=True))
    assert (model.layout.template, model.layout.system) == (expected, system)
    got, directory = both_prompts(model, template)
    assert got == (VICUNA_SYSTEM + " " if template == VICUNA else "") + directory
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "ours" / "model")
    assert voco.model.load(str(tmp_path / "ours")).layout.system == system
    voco.model.export(str(tmp_path / "ours"), str(tmp_path / "out"))
    back = voco.model.load(str(tmp_path / "out"))
    assert (back.layout.template, back.layout.system) == (expected, system)


REFUSED_SYSTEMS = [
    ("llama", MISTRAL.replace("[INST] ' +", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n' +"), r"none of vicuna_v1"),
    (
        "llama",
        "{{ '[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n' + messages[0]['content'] + ' [/INST]' + messages[1]['content']"
        " + '</s>[INST] ' + messages[2]['content'] + ' [/INST]' }}",
        r"begins a prompt with .*<<SYS>>.*, which mistral_instruct cannot write; text\.system: \"\" does without it",
    ),
    ("mistral", "Be brief. " + MISTRAL, "begins a prompt with .*Be brief.*, which mistral_instruct cannot write"),
    ("qwen2", CHATML.replace("You help.", "You<|im_end|>help."), "which chatml cannot write"),
    ("llama", LLAMA_3_1.replace("26 Jul 2024", "' + strftime_now('%d %b %Y') + '"), "may write the current date"),
]


@pytest.mark.parametrize(("family", "template", "message"), REFUSED_SYSTEMS)
def test_a_system_prompt_that_we_cannot_write_is_refused(tmp_path: Path, family: str, template: str, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        voco.model.load(saved(tmp_path, family, template, markers=True))
    assert "\n" not in str(refused.value)


def test_a_jobs_system_prompt_comes_first(tmp_path: Path) -> None:
    uri = saved(tmp_path / "a", "qwen2", QWEN_2, markers=True)
    assert created(uri, Text(template="chatml")).layout.system == "You are a helpful assistant."
    for system in ("", "Be brief."):
        model = created(uri, Text(template="chatml", system=system))
        assert model.layout.system == system
        assert both_prompts(model, QWEN_2.replace("You are a helpful assistant.", system))[0].startswith(
            f"<|im_start|>system\n{system}<|im_end|>\n" if system else "<|im_start|>user"
        )
    mistral = saved(tmp_path / "b", "mistral", "Be brief. " + MISTRAL)
    assert created(mistral, Text(template="mistral_instruct", system="")).layout.system == ""
    with pytest.raises(ValueError, match="expected no `system`: mistral_instruct has no room for a system prompt"):
        Text(template="mistral_instruct", system="Be brief.")


def test_a_continued_checkpoint_keeps_its_system_prompt(tmp_path: Path) -> None:
    model = created(saved(tmp_path / "theirs", "qwen2", QWEN_2, markers=True), None)
    weights.save_checkpoint(model, weights.own_state(model), tmp_path / "ours" / "model")
    block = {"epochs": 1, "global_batch": 2, "micro_batch": 1, "learning_rate": 0.1}
    for text, expected in (
        (None, ("chatml", "You are a helpful assistant.")),
        ({"template": "chatml"}, ("chatml", "You are a helpful assistant.")),
        ({"template": "chatml", "system": ""}, ("chatml", "")),
        ({"template": "vicuna_v1"}, ("vicuna_v1", None)),
    ):
        job = {
            "name": "a", "kind": "image_sft", "output": str(tmp_path / "out"), "compression": {"method": "voco", "tokens": 2},
            "inputs": {"samples": [{"uri": "s"}], "features": "f", "checkpoint": str(tmp_path / "ours")},
            "image_sft": block if text is None else {**block, "text": text},
        }  # fmt: skip
        checked = build_job("job.yaml", job)
        _, layout = initial_model(checked, str(tmp_path / "out"))
        assert (layout.template, layout.system) == expected
        hashed = hashed_content(checked)["image_sft"]["text"]  # run ids of jobs without the key do not change
        assert hashed is None or ("system" in hashed) == ("system" in (text or {}))


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
