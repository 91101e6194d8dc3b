"""The chat template that a directory carries, which row of CHAT_TEMPLATES it is, and its default system prompt.

A directory has a Jinja template, ours are rows of parts. Both are rendered with the same turns and compared by what stands
between them: the markers of the roles. The place of the image, white space at the ends and the end of sequence after an answer
do not count: LLaVA's own code and transformers' files of the same checkpoint differ in them. For the same reason a directory
that writes no system prompt leaves the row its own; the system prompt that a directory does write is taken over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from voco.errors import Refused
from voco.job.chat_templates import CHAT_TEMPLATES, EOS, PromptPart
from voco.job.config import Text
from voco.model.interop.model_files import read_json_file
from voco.sequence.chat_template import Turn, control_texts, end_of_answer_id, render_prompt

TURNS: list[Turn] = [
    {"role": "user", "text": "alpha"}, {"role": "assistant", "text": "beta"}, {"role": "user", "text": "gamma"},
]  # fmt: skip
# of a LLaVA that carries no template; llama_3 for tokenizers with its control tokens, which Vicuna's is not
FAMILIES = {"llama": "llama_3", "mistral": "mistral_instruct", "qwen2": "chatml", "qwen3": "chatml"}
TODAY = "strftime_now"  # transformers' function of the current date in a template

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
    in its template, None for a language model alone. The directory's system prompt is taken over where the job names none.
    Raises Refused for a template that a LLaVA contradicts, and without a job's block for a template that is none of ours and
    for a system prompt that our template has no room for or that changes with the date.
    """
    if text is not None and (llava_family is None or CHAT_TEMPLATES[text.template].drops_questions):
        return text
    if template is None:
        family = FAMILIES.get(llava_family or "")
        return text or (Text(template=family) if family and _can_have(family, tokenizer) else Text())
    start, markers = _markers(_render(template, tokenizer, source), tokenizer)
    names = [name for name in CHAT_TEMPLATES if _can_have(name, tokenizer) and _own_markers(name, tokenizer) == markers]
    systems = {name: _system_prompt(name, start, tokenizer) for name in names}
    names.sort(key=lambda name: systems[name] != CHAT_TEMPLATES[name].default_system)  # stable: the same system prompt first
    chosen = text or (Text(template=names[0]) if names else None)
    if chosen is None or chosen.template not in names:
        got = f"its own chat template ({', '.join(names) or 'none of ' + ', '.join(CHAT_TEMPLATES)})"
        wanted = "" if text is None else f", not {text.template}"
        remedy = f"use {names[0]}" if names else "add it as a chat template (docs/extending.md)"
        remedy += "" if names or llava_family else ", or name one that the model will be trained in"
        raise Refused(f"text.template: {source} answers in {got}{wanted}; {remedy}")
    if chosen.system is not None:
        return chosen
    system = _taken_over(chosen.template, systems[chosen.template], start, template, source)
    return chosen.model_copy(update={"system": system})


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


def _taken_over(name: str, system: str | None, start: str, template: str, source: str) -> str | None:
    """The system prompt of a directory for the row `name`; None where it writes none or the row's own."""
    if system is None:
        raise Refused(
            f"text.system: {source} begins a prompt with {start.strip()!r}, which {name} cannot write; "
            'text.system: "" does without it'
        )
    if not system or system == CHAT_TEMPLATES[name].default_system:
        return None
    if TODAY in template:
        raise Refused(f"text.system: {source} may write the current date ({system!r}); name a system prompt that does not change")
    return system


def _system_prompt(name: str, start: str, tokenizer: Any) -> str | None:
    """The system prompt in what a directory writes before the first question, "" for none.

    None where it is not what the row `name` can write: of other markers, or with the text of a control token in it.
    """
    row = CHAT_TEMPLATES[name]
    body, user = start.removeprefix(tokenizer.bos_token or "").rstrip(), _text(row.user[0], tokenizer).rstrip()
    if not body.endswith(user):
        return None
    body = body.removesuffix(user)
    if not body.strip():
        return ""
    if row.system is None:
        return None
    before, after = (_text(parts, tokenizer) for parts in row.system)
    # a prompt's own white space is kept where the rest is the row's to the letter
    for section, head, tail in ((body, before, after), (body.strip(), before.strip(), after.strip())):
        if section.startswith(head) and section.endswith(tail) and len(section) > len(head) + len(tail):
            system = section[len(head) : len(section) - len(tail)]
            return None if any(text in system for text in control_texts(tokenizer)) else system
    return None


def _own_markers(name: str, tokenizer: Any) -> Markers:
    return _markers(_text(render_prompt(TURNS, name, "keep", has_views=False), tokenizer), tokenizer)[1]


def _text(parts: Sequence[PromptPart], tokenizer: Any) -> str:
    return "".join(tokenizer.eos_token if part == EOS else part.text for part in parts)


def _markers(prompt: str, tokenizer: Any) -> tuple[str, Markers]:
    """What is before the first question, and the markers after it."""
    between = []
    for turn in TURNS:
        before, _, prompt = prompt.partition(turn["text"])
        between.append(before)
    start, after_question, after_answer = between
    ended = after_answer.replace(tokenizer.eos_token, "") if tokenizer.eos_token else after_answer
    return start, (after_question.strip(), ended.strip(), prompt.strip())
