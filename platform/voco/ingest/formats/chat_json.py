"""Chat datasets in the layouts of other trainers, as one JSON list or one object a line; each row is recognised by its keys.

LLaMA-Factory: {"messages": [{"role": "user", "content": "<image>Who is it?"}, {"role": "assistant", "content": "Ada."}],
                "images": ["1.jpg"]}                           `videos` and <video> for clips; several media in their order
OpenAI:        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "1.jpg"}},
                {"type": "text", "text": "Who is it?"}]}, ...]}    also parts `image`, `video`, `video_url`
ms-swift:      {"query": "Who is it?", "response": "Ada.", "images": ["1.jpg"], "history": [["Hi", "Hello"]], "system": "..."}
               {"conversation": [{"human": "<image>Who is it?", "assistant": "Ada."}], "images": ["1.jpg"]}

Rows of LLaVA's layout are read as well. There is one placeholder for each medium, in the user's turns; in ms-swift's rows without
any, the media come before the first question. A system turn, `system` or `system_prompt` goes to `extra` and is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from voco.ingest.chat_rows import (
    IMAGE,
    MARKS,
    ROLES,
    VIDEO,
    Turns,
    alternate,
    paths_of,
    row_identity,
    single_modality,
    take_placeholders,
)  # fmt: skip
from voco.ingest.formats import Format, llava_json
from voco.ingest.layouts import advice
from voco.ingest.parsing.json_rows import as_object, iterate_rows
from voco.ingest.source_row import BadRow, Reject, SourceRow, category_and_extra, make_source_row, parse_rows
from voco.job.config import Ingest

IMAGE_KEYS, VIDEO_KEYS, SYSTEM_KEYS = ("images", "image"), ("videos", "video"), ("system", "system_prompt")
TURN_KEYS = {"messages", "conversation", "query", "response", "history"}
OWN_KEYS = {"id", *IMAGE_KEYS, *VIDEO_KEYS, *SYSTEM_KEYS, *TURN_KEYS}
PARTS = {"image_url": "image", "image": "image", "video_url": "video", "video": "video"}  # types of content parts


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row of the file, in order. Raises Refused when the file is neither a JSON list nor JSON lines."""
    return parse_rows(uri, iterate_rows(uri), lambda raw, _, source: parse(raw, source, block))


def parse(raw: Any, source: str, block: Ingest) -> SourceRow:
    """One row as a SourceRow. Raises BadRow for its first fault."""
    raw = as_object(raw)
    if "conversations" in raw:
        return llava_json.parse(raw, source, block)
    inline: dict[str, list[str]] = {"image": [], "video": []}  # of content parts, whose marks are put into the text
    listed = _turns(raw, inline)
    images = [path for key in IMAGE_KEYS for path in paths_of(raw.get(key), key)] + inline["image"]
    videos = [path for key in VIDEO_KEYS for path in paths_of(raw.get(key), key)] + inline["video"]
    modality, paths = single_modality(images, videos)
    turns, system = alternate(listed)
    mark = MARKS.get(modality, IMAGE)
    if "messages" not in raw and not any(mark in text for _, text in turns):
        turns[0] = ("user", mark * len(paths) + turns[0][1])
    if modality == "text" and any(VIDEO in text for role, text in turns if role == "user"):
        mark = VIDEO
    turns, placeholder = take_placeholders(turns, mark, len(paths), raw)
    category, extra = category_and_extra(raw, OWN_KEYS)
    system = system or next((raw[key] for key in SYSTEM_KEYS if isinstance(raw.get(key), str)), "")
    return make_source_row(
        source, block, modality=modality, paths=paths, turns=turns, placeholder=placeholder,
        source_id=row_identity(raw), category=category, extra=extra, system=system,
    )  # fmt: skip


def _turns(raw: dict[str, Any], inline: dict[str, list[str]]) -> Turns:
    """(role, text) of every turn of the row's layout. Raises BadRow."""
    if isinstance(raw.get("messages"), list):
        return [_message(turn, index, inline) for index, turn in enumerate(raw["messages"])]
    if isinstance(raw.get("conversation"), list):
        pairs = [(turn.get("human"), turn.get("assistant")) if isinstance(turn, dict) else () for turn in raw["conversation"]]
    elif "query" in raw:
        pairs = [tuple(pair) if isinstance(pair, list) else () for pair in raw.get("history") or []]
        pairs.append((raw["query"], raw.get("response")))
    else:
        hint = advice(raw, "chat_json")
        raise BadRow("bad_record", f"expected messages, conversation, or query and response, got {_keys(raw)}{hint}")
    turns: Turns = []
    for index, pair in enumerate(pairs):
        unanswered = index == len(pairs) - 1 and len(pair) == 2 and pair[1] is None
        if len(pair) != 2 or not isinstance(pair[0], str) or not (isinstance(pair[1], str) or unanswered):
            raise BadRow("bad_record", f"pair {index}: expected the texts of a question and an answer")
        turns.append(("user", pair[0]))
        if isinstance(pair[1], str):
            turns.append(("assistant", pair[1]))
    return turns


def _keys(raw: dict[str, Any]) -> str:
    return ", ".join(sorted(raw)[:8])[:200] or "no keys"


def _message(turn: Any, index: int, inline: dict[str, list[str]]) -> tuple[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str | list):
        raise BadRow("bad_record", f"messages[{index}]: expected an object with `role` and `content`")
    if turn["role"] not in ROLES:
        raise BadRow("bad_conversation", f"turn {index}: expected user or assistant, got {turn['role'][:40]!r}")
    content = turn["content"]
    text = content if isinstance(content, str) else "".join(_part(part, index, inline) for part in content)
    return ROLES[turn["role"]], text


def _part(part: Any, index: int, inline: dict[str, list[str]]) -> str:
    """The text of a content part: its own, or the mark of its medium, whose path is added to `inline`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind not in PARTS:
        raise BadRow("unsupported_format", f"messages[{index}]: a content part of type {str(kind)[:40]!r}")
    modality = PARTS[kind]
    paths = paths_of(part.get(kind), f"messages[{index}].{kind}")
    if kind == modality and not paths:
        return MARKS[modality]  # a part without a path stands for the next of the row's images, as in Hugging Face's templates
    inline[modality] += paths
    return MARKS[modality] * len(paths)


FORMAT = Format(read)
