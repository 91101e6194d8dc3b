"""The chat template that a directory carries, and which row of CHAT_TEMPLATES it is.

A directory has a Jinja template, ours are rows of parts. Both are rendered with the same turns and compared by what stands
between them: the markers of the roles. The place of the image, white space at the ends, a system prompt and the end of sequence
after an answer do not count: LLaVA's own code and transformers' files of the same checkpoint differ in them.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from voco.errors import Refused
from voco.job.chat_templates import CHAT_TEMPLATES, EOS
from voco.job.config import Text
from voco.model.interop.model_files import read_json_file
from voco.sequence.chat_template import Turn, end_of_answer_id, render_prompt

TURNS: list[Turn] = [
    {"role": "user", "text": "alpha"}, {"role": "assistant", "text": "beta"}, {"role": "user", "text": "gamma"},
]  # fmt: skip
FAMILIES = {"mistral": "mistral_instruct", "qwen2": "chatml", "qwen3": "chatml"}  # of a LLaVA that carries no template

Markers = tuple[str, str, str]  # between a question and its answer, between an answer and the next question, before an answer


def directory_template(folder: str, tokenizer: Any) -> str | None:
    """The Jinja template of a directory: its processor's, else its tokenizer's; None where it has none."""
    for file in ("chat_template.json", "processor_config.json"):
        template = (read_json_file(folder, file) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def choose_text(text: Text | None, template: str | None, tokenizer: Any, llava_family: str | None, source: str) -> Text:
    """The `text` block of a model from a directory with the Jinja `template`.

    `text` is the job's, None without one; `llava_family` the kind of language model of a LLaVA, which has learned to answer
    in its template, None for a language model alone. Raises Refused for a template that a LLaVA contradicts, and without a
    job's block for a template that is none of ours.
    """
    if text is not None and (llava_family is None or CHAT_TEMPLATES[text.template].drops_questions):
        return text
    if template is None:
        family = FAMILIES.get(llava_family or "")
        return text or (Text(template=family) if family and _can_have(family, tokenizer) else Text())
    system, markers = _markers(_render(template, tokenizer, source), tokenizer)
    rows = {name: _own_markers(name, tokenizer) for name in CHAT_TEMPLATES if _can_have(name, tokenizer)}
    names = [name for name, row in rows.items() if row[1] == markers]
    names.sort(key=lambda name: rows[name] != (system, markers))  # stable: the same system prompt first
    if text is not None and text.template in names:
        return text
    if not names or text is not None:
        got = f"its own chat template ({', '.join(names) or 'none of ' + ', '.join(CHAT_TEMPLATES)})"
        wanted = "" if text is None else f", not {text.template}"
        remedy = f"use {names[0]}" if names else "add it as a chat template (docs/extending.md)"
        remedy += "" if names or llava_family else ", or name one that the model will be trained in"
        raise Refused(f"text.template: {source} answers in {got}{wanted}; {remedy}")
    return Text(template=names[0])


def _can_have(name: str, tokenizer: Any) -> bool:
    """True for a template that the tokenizer can encode."""
    try:
        end_of_answer_id(name, tokenizer)
    except Refused:
        return False
    return not CHAT_TEMPLATES[name].drops_questions


def _render(template: str, tokenizer: Any, source: str) -> str:
    """The prompt of TURNS; a processor's template reads a list of parts, a tokenizer's a string."""
    for as_parts in (True, False):
        turns = [
            {"role": turn["role"], "content": [{"type": "text", "text": turn["text"]}] if as_parts else turn["text"]}
            for turn in TURNS
        ]
        try:
            prompt: str = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError):
            continue
        if "{'type'" not in prompt and all(turn["text"] in prompt for turn in TURNS):
            return prompt
    raise Refused(f"{source}: its chat template cannot be rendered with a question, an answer and a question")


def _own_markers(name: str, tokenizer: Any) -> tuple[str, Markers]:
    parts = render_prompt(TURNS, name, "keep", has_views=False)
    return _markers("".join(tokenizer.eos_token if part == EOS else part.text for part in parts), tokenizer)


def _markers(prompt: str, tokenizer: Any) -> tuple[str, Markers]:
    """What is before the first question, and the markers after it."""
    between = []
    for turn in TURNS:
        before, _, prompt = prompt.partition(turn["text"])
        between.append(before)
    start, after_question, after_answer = between
    ended = after_answer.replace(tokenizer.eos_token, "") if tokenizer.eos_token else after_answer
    return start.strip(), (after_question.strip(), ended.strip(), prompt.strip())
