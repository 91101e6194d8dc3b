"""Turns to a prompt and a prompt to token ids, each marked as trained or not, by `job/chat_templates.py`. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from voco.errors import Refused
from voco.job.chat_templates import CHAT_TEMPLATES, EOS, Parts, PromptPart

CONTROL = "\U000f0000"  # of the private use area
Encoded = tuple[tuple[int, ...], tuple[int, ...]]  # ids, and the index of each token's last character


class Turn(TypedDict):
    """One turn of a conversation; `role` is user or assistant."""

    role: str
    text: str


def render_prompt(
    turns: list[Turn], template: str, newlines: str, has_views: bool, system: str | None = None
) -> list[PromptPart]:
    """The parts of a prompt, in order. After turns that end with a user turn, the prompt ends where the answer starts.

    `newlines` is keep or strip; the released code strips every newline of a sample with an image: so does strip, and so does
    its template. `system` is the system prompt, "" for none and None for the template's.
    """
    row = CHAT_TEMPLATES[template]
    strip = has_views and (row.strips_newlines or newlines == "strip")
    parts = [PromptPart(row.after_image)] if has_views else []
    parts += system_parts(template, system)
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


def system_parts(template: str, system: str | None) -> Parts:
    """The parts of a system prompt; None stands for the template's. Raises Refused for a template without room for one."""
    row = CHAT_TEMPLATES[template]
    text = row.default_system if system is None else system
    if not text:
        return ()
    if row.system is None:
        raise Refused(f"text.system: {template} has no room for a system prompt; leave it out")
    before, after = row.system
    return (*before, PromptPart(text), *after)


def control_texts(tokenizer: Any) -> list[str]:
    """The texts of a tokenizer's control tokens, sorted; added tokens of white space alone are none."""
    return sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip())


def end_of_answer_id(template: str, tokenizer: Any) -> int:
    """The id that ends an answer. Raises Refused for a tokenizer without the template's control tokens, and for one that has
    a text of the template as a control token, as Mistral's has [INST] since its version 3.
    """
    row = CHAT_TEMPLATES[template]
    vocabulary = tokenizer.get_vocab()
    added = control_texts(tokenizer)
    for part in itertools.chain(*(row.system or ()), system_parts(template, None), *row.user, *row.assistant):
        if part.control and part != EOS and part.text not in vocabulary:
            raise Refused(f"text.template: {template} needs {part.text}, which this model's tokenizer does not have")
        spelled = [token for token in added if not part.control and token in part.text]
        if spelled:
            raise Refused(f"text.template: {template} writes {spelled[0]}, which this model's tokenizer has as a control token")
    end = row.assistant[1][0]
    end_id: int = vocabulary[end.text] if end.control and end != EOS else tokenizer.eos_token_id
    return end_id


def encode_parts(
    parts: Sequence[PromptPart], tokenizer: Any, eos_id: int, follows: str | None = ""
) -> tuple[list[int], list[bool]]:
    """Ids, and whether each is trained. Adjacent strings are tokenised together and marked by character offsets.

    Text that spells a special token stays text: only the template inserts control tokens, by id. `follows` is the text before
    the parts, None for a control token: what comes after either has the ids that it has inside the whole string.
    """
    ids: list[int] = []
    trained: list[bool] = []
    pending: list[PromptPart] = []

    def flush() -> None:
        text = "".join(part.text for part in pending)
        if text:
            marks = np.concatenate([np.full(len(part.text), part.trained) for part in pending])
            token_ids, last_chars = _encode_answers(pending, tokenizer, follows if not ids else None)
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


def _encode_answers(parts: Sequence[PromptPart], tokenizer: Any, follows: str | None) -> Encoded:
    """Ids of adjacent strings. Those before an answer are the prompt's alone, which is all that inference has.

    Where a tokenizer joins an answer's first characters with the prompt's last ones, such as two newlines, or encodes these
    otherwise because of the answer, the answer is encoded by itself.
    """
    texts = [""]
    for part, previous in zip(parts, [None, *parts], strict=False):
        if part.trained and previous is not None and not previous.trained:
            texts.append("")
        texts[-1] += part.text
    prompt, coded = texts[0], _tokenise(tokenizer, texts[0], follows)
    for text in texts[1:]:
        joined = _tokenise(tokenizer, prompt + text, follows)
        if joined[0][: len(coded[0])] != coded[0]:
            ids, last_chars = _tokenise(tokenizer, text, None)
            joined = coded[0] + ids, coded[1] + tuple(len(prompt) + char for char in last_chars)
        prompt, coded = prompt + text, joined
    return coded


@lru_cache(maxsize=1 << 14)  # VQA sets repeat most of their questions
def _tokenise(tokenizer: Any, text: str, follows: str | None = "") -> Encoded:
    """Ids of a text, none of them a control token's, and the index of each token's last character.

    `follows` is the text before it; None for a control token, after which SentencePiece without `legacy` adds no space.
    """
    if follows:
        ids, last_chars = _tokenise(tokenizer, follows + text)
        before, _ = _tokenise(tokenizer, follows)
        if ids[: len(before)] != before:  # joined with the text before it
            return _tokenise(tokenizer, text, None)
        return ids[len(before) :], tuple(char - len(follows) for char in last_chars[len(before) :])
    mark = "" if follows is not None else CONTROL * next(count for count in itertools.count(1) if CONTROL * count not in text)
    plain, controls = _without_control_tokens(tokenizer, mark=mark)
    coded = plain.encode(mark + text, add_special_tokens=False)
    if not controls.keys().isdisjoint(coded.ids):  # the model itself joins their characters
        apart = frozenset(controls[token_id] for token_id in controls.keys() & set(coded.ids))
        plain, _ = _without_control_tokens(tokenizer, apart, mark)
        coded = plain.encode(mark + text, add_special_tokens=False)
    first = 1 if mark else 0
    return tuple(coded.ids[first:]), tuple(max(start, stop - 1) - len(mark) for start, stop in coded.offsets[first:])


@lru_cache(maxsize=64)
def _without_control_tokens(
    tokenizer: Any, apart: frozenset[str] = frozenset(), mark: str = ""
) -> tuple[Tokenizer, dict[int, str]]:
    """The tokenizer as if it had no control tokens, and the control tokens that it leaves out: {id: text}.

    A tokenizer looks for its added tokens before anything else, and `split_special_tokens` skips only those that are marked as
    special: a checkpoint's `<think>` or `<extra_id_0>` may be unmarked. Here each is marked, so each is skipped. Added tokens
    of white space alone are no control tokens: GPT-NeoX encodes the indentation of code with them.

    Model, normalizer and pre-tokenizer are shared, not copied, so text without control tokens has the same ids and offsets.

    `apart` are texts whose last character is never joined with what is before it, for control tokens whose text the model
    itself encodes as their id: by the merges of a BPE, or as a whole word of its vocabulary.

    `mark` is a text that becomes an added token and so stands for a control token before a text.
    """
    backend = tokenizer.backend_tokenizer
    plain = Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    plain.post_processor = backend.post_processor  # a byte-level one cuts the space before a word from its offsets
    ends = "|".join(f"(?<={re.escape(text[:-1])}){re.escape(text[-1])}" for text in sorted(apart) if len(text) > 1)
    if ends:
        steps = [*([backend.pre_tokenizer] if backend.pre_tokenizer else []), pre_tokenizers.Split(Regex(ends), "isolated")]
        plain.pre_tokenizer = pre_tokenizers.Sequence(steps)
    controls: dict[int, str] = {}
    for token_id, token in sorted(backend.get_added_tokens_decoder().items()):  # the ids are given in this order
        if token.content.strip():
            controls[token_id] = token.content
            plain.add_special_tokens([token])
        else:
            plain.add_tokens([token])
    if mark:
        plain.add_tokens([AddedToken(mark, normalized=False)])  # not special: it is looked for
    plain.encode_special_tokens = True
    return plain, controls
