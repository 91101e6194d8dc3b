"""Turns to a prompt, and a prompt to ids. What is trained on is marked here, nowhere else. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np

from voco.errors import Refused

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Turn(TypedDict):
    """One turn of a conversation; `role` is user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class PromptPart:
    """A piece of a prompt. `text` is the string, or the name of a control token that is inserted by id."""

    text: str
    control: bool = False
    trained: bool = False


@dataclass(frozen=True)
class Template:
    """How turns are joined. Strings in angle brackets of `before`/`after` fields are never parsed out of user text."""

    start: tuple[PromptPart, ...]  # before the first turn
    after_image: str  # stands first when the sample has views: the newline after the <voco> tokens
    user: tuple[PromptPart, PromptPart]  # around a user turn
    assistant: tuple[PromptPart, PromptPart]  # around an assistant turn; the second part ends it and is trained
    answer_space: str  # between the assistant's role and its text; belongs to the trained text
    drops_questions: bool = False


EOS = PromptPart("eos", control=True, trained=True)

TEMPLATES: dict[str, Template] = {
    # LLaVA-1.5: system USER: q ASSISTANT: a</s>USER: ...
    "vicuna_v1": Template(
        start=(PromptPart(VICUNA_SYSTEM + " "),),
        after_image="\n",
        user=(PromptPart("USER: "), PromptPart(" ")),
        assistant=(PromptPart("ASSISTANT:"), EOS),
        answer_space=" ",
    ),
    # LLaVA's alignment stage: the image, the caption, a newline; the question is dropped
    "plain": Template(
        start=(),
        after_image="",
        user=(PromptPart(""), PromptPart("")),
        assistant=(PromptPart(""), PromptPart("\n", trained=True)),
        answer_space="",
        drops_questions=True,
    ),
    # OpenAI's chat markup, as SmolLM2 and Qwen use it
    "chatml": Template(
        start=(),
        after_image="",
        user=(PromptPart("<|im_start|>", control=True), PromptPart("<|im_end|>", control=True)),
        assistant=(PromptPart("<|im_start|>", control=True), PromptPart("<|im_end|>", control=True, trained=True)),
        answer_space="",
    ),
    # the shortest there is, for small models: the question, a newline, the answer
    "question_answer": Template(
        start=(),
        after_image="",
        user=(PromptPart(""), PromptPart("\n")),
        assistant=(PromptPart(""), EOS),
        answer_space="",
    ),
}


def _clean(text: str, newlines: str) -> str:
    return text.replace("\n", "") if newlines == "strip" else text


def render_prompt(turns: list[Turn], template: str, newlines: str, has_views: bool) -> list[PromptPart]:
    """The parts of a prompt, in order. Turns that end on a user turn get the assistant's role last, ready for an answer.

    `newlines` is keep or strip; the released code strips every newline of a sample with an image, and so does strip.
    """
    form = TEMPLATES[template]
    newlines = newlines if has_views else "keep"
    parts = [PromptPart(form.after_image)] if has_views else []
    parts += form.start
    for turn in turns:
        text = _clean(turn["text"], newlines)
        if turn["role"] == "user":
            if form.drops_questions:
                continue
            parts += [form.user[0], *_role("user", template), PromptPart(text), form.user[1]]
            if template == "chatml":
                parts.append(PromptPart("\n"))
        else:
            parts += [form.assistant[0], *_role("assistant", template)]
            parts += [PromptPart(form.answer_space + text, trained=True), form.assistant[1]]
            if template == "chatml":
                parts.append(PromptPart("\n"))
    if not turns or turns[-1]["role"] == "user":
        parts += [form.assistant[0], *_role("assistant", template)]
    return [part for part in parts if part.text]


def _role(role: str, template: str) -> list[PromptPart]:
    return [PromptPart(f"{role}\n")] if template == "chatml" else []


def end_of_answer_id(template: str, tokenizer: Any) -> int:
    """The id that ends an answer. Raises Refused for a tokenizer without the template's control tokens."""
    form = TEMPLATES[template]
    vocabulary = tokenizer.get_vocab()
    for part in (*form.user, *form.assistant):
        if part.control and part != EOS and part.text not in vocabulary:
            raise Refused(f"text.template: {template} needs {part.text}, which this model's tokenizer does not have")
    end = form.assistant[1]
    found: int = vocabulary[end.text] if end.control and end != EOS else tokenizer.eos_token_id
    return found


def encode_parts(parts: Sequence[PromptPart], tokenizer: Any, eos_id: int) -> tuple[list[int], list[bool]]:
    """Ids and whether each is trained on. Adjoining strings are tokenised as one and marked by character offsets.

    Text that spells a special token stays text: control tokens come from the template only, by id.
    """
    ids: list[int] = []
    trained: list[bool] = []
    run: list[PromptPart] = []

    def flush() -> None:
        text = "".join(part.text for part in run)
        if text:
            marks = np.concatenate([np.full(len(part.text), part.trained) for part in run])
            coded, ends = _tokenise(tokenizer, text)
            ids.extend(coded)
            # a token belongs to the part in which it ends: the space before an answer is part of its first token
            trained.extend(bool(marks[end]) for end in ends)
        run.clear()

    for part in parts:
        if part.control:
            flush()
            ids.append(eos_id if part.text == "eos" else tokenizer.convert_tokens_to_ids(part.text))
            trained.append(part.trained)
        else:
            run.append(part)
    flush()
    return ids, trained


@lru_cache(maxsize=1 << 14)  # questions repeat: in VQA sets most texts are ones that were seen before
def _tokenise(tokenizer: Any, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of a text, and the index of each token's last character."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return tuple(coded["input_ids"]), tuple(max(start, stop - 1) for start, stop in coded["offset_mapping"])
