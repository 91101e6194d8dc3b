"""Turns to a prompt and a prompt to token ids, each marked as trained or not, by `job/chat_templates.py`. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np

from voco.errors import Refused
from voco.job.chat_templates import CHAT_TEMPLATES, EOS, PromptPart


class Turn(TypedDict):
    """One turn of a conversation; `role` is user or assistant."""

    role: str
    text: str


def render_prompt(turns: list[Turn], template: str, newlines: str, has_views: bool) -> list[PromptPart]:
    """The parts of a prompt, in order. After turns that end with a user turn, the prompt ends where the answer starts.

    `newlines` is keep or strip; the released code strips every newline of a sample with an image, and so does strip.
    """
    row = CHAT_TEMPLATES[template]
    strip = has_views and newlines == "strip"
    parts = [PromptPart(row.after_image)] if has_views else []
    parts += row.start
    for turn in turns:
        text = turn["text"].replace("\n", "") if strip else turn["text"]
        if turn["role"] == "user":
            if not row.drops_questions:
                before, after = row.user
                parts += [*before, PromptPart(text), *after]
        else:
            before, after = row.assistant
            parts += [*before, PromptPart(row.answer_space + text, trained=True), *after]
    if not turns or turns[-1]["role"] == "user":
        parts += row.assistant[0]
    return [part for part in parts if part.text]


def end_of_answer_id(template: str, tokenizer: Any) -> int:
    """The id that ends an answer. Raises Refused for a tokenizer without the template's control tokens."""
    row = CHAT_TEMPLATES[template]
    vocabulary = tokenizer.get_vocab()
    for part in itertools.chain(row.start, *row.user, *row.assistant):
        if part.control and part != EOS and part.text not in vocabulary:
            raise Refused(f"text.template: {template} needs {part.text}, which this model's tokenizer does not have")
    end = row.assistant[1][0]
    end_id: int = vocabulary[end.text] if end.control and end != EOS else tokenizer.eos_token_id
    return end_id


def encode_parts(parts: Sequence[PromptPart], tokenizer: Any, eos_id: int) -> tuple[list[int], list[bool]]:
    """Ids, and whether each is trained. Adjacent strings are tokenised together and marked by character offsets.

    Text that spells a special token stays text: only the template inserts control tokens, by id.
    """
    ids: list[int] = []
    trained: list[bool] = []
    pending: list[PromptPart] = []

    def flush() -> None:
        text = "".join(part.text for part in pending)
        if text:
            marks = np.concatenate([np.full(len(part.text), part.trained) for part in pending])
            token_ids, last_chars = _tokenise(tokenizer, text)
            ids.extend(token_ids)
            # a token belongs to the part in which it ends: the space before an answer is part of its first token
            trained.extend(bool(marks[char]) for char in last_chars)
        pending.clear()

    for part in parts:
        if part.control:
            flush()
            ids.append(eos_id if part.text == EOS.text else tokenizer.convert_tokens_to_ids(part.text))
            trained.append(part.trained)
        else:
            pending.append(part)
    flush()
    return ids, trained


@lru_cache(maxsize=1 << 14)  # VQA sets repeat most of their questions
def _tokenise(tokenizer: Any, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of a text, and the index of each token's last character."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return tuple(coded["input_ids"]), tuple(max(start, stop - 1) for start, stop in coded["offset_mapping"])
