"""LLaVA's JSON list: a row is a conversation about one image, one video or text only.

    {"id": "000000123456", "image": "coco/train2017/000000123456.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is on the shelf?"}, {"from": "gpt", "value": "A teapot"}]}
    {"id": 1012345678, "video": "012301_012350/1012345678.mp4", "conversations": [...]}

`id` is a string or an integer; it may be absent and may repeat. A row without `image` and `video` is text only. A video's
placeholder is `<image>`, as in LLaMA-VID, or `<video>`, as in Video-ChatGPT. Video-ChatGPT's `.pkl` (features of a video) means
the video itself, looked up with every video extension, and its stray marker is removed from the answers. `category` goes to its
column, further keys to `extra`. LLaVA's 665k mix, CC3M's `chat.json` and LLaMA-VID's mixes with WebVid and Video-ChatGPT are
such files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from voco.ingest.formats import Format
from voco.ingest.formats.video_chatgpt import clean_answer
from voco.ingest.parsing import json_list
from voco.ingest.source_row import BadRow, Reject, SourceRow, category_and_extra, make_source_row, parse_rows
from voco.job.config import Ingest

IMAGE, VIDEO = "<image>", "<video>"
FEATURES = ".pkl"
ROLES = {"human": "user", "gpt": "assistant"}
OWN_KEYS = {"id", "image", "video", "conversations"}


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row of the file, in order. Raises Refused when the file is not one JSON list."""
    return parse_rows(uri, json_list.iterate_list(uri), lambda raw, _, source: parse(raw, source, block))


def parse(raw: Any, source: str, block: Ingest) -> SourceRow:
    """One row as a SourceRow. Raises BadRow for its first fault."""
    if not isinstance(raw, dict):
        raise BadRow("bad_record", f"expected an object, got {type(raw).__name__}")
    modality, path = _medium(raw)
    turns = _turns(raw)
    category, extra = category_and_extra(raw, OWN_KEYS)
    identity = _identity(raw)
    placeholder = "none"
    if path is not None:
        mark = VIDEO if modality == "video" and VIDEO in turns[0][1] else IMAGE
        first, placeholder = take_placeholder(turns[0][1], mark)
        turns = [("user", first), *turns[1:]]
    if modality == "video":
        turns = [(role, clean_answer(text) if role == "assistant" else text) for role, text in turns]
    return make_source_row(
        source, block, modality=modality, path=path, turns=turns, placeholder=placeholder,
        source_id=identity, category=category, extra=extra,
    )  # fmt: skip


def _identity(raw: dict[str, Any]) -> str:
    value = raw.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("bad_record", f"id: expected a string or an integer, got {type(value).__name__}")
    return str(value)


def _medium(raw: dict[str, Any]) -> tuple[str, str | None]:
    """The row's modality and the path of its medium."""
    media = [(key, raw[key]) for key in ("image", "video") if raw.get(key) is not None]
    if not media:
        return "text", None
    if len(media) > 1:
        raise BadRow("unsupported_format", "an image and a video in one row")
    ((modality, path),) = media
    if not isinstance(path, str):
        raise BadRow("bad_record", f"{modality}: expected one path, got {type(path).__name__}")
    return modality, path.removesuffix(FEATURES) if modality == "video" else path


def _turns(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of every turn. A first turn that is not the human's is dropped, as in LLaVA."""
    listed = raw.get("conversations")
    if not isinstance(listed, list):
        raise BadRow("bad_record", f"conversations: expected a list, got {type(listed).__name__}")
    turns: list[tuple[str, str]] = []
    for index, turn in enumerate(listed):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            raise BadRow("bad_record", f"conversations[{index}]: expected an object with `from` and `value` strings")
        turns.append((turn["from"], turn["value"]))
    if turns and turns[0][0] != "human":
        turns = turns[1:]
    if not turns:
        raise BadRow("bad_conversation", "there is no human turn")
    for index, (speaker, _) in enumerate(turns):
        if speaker != ("human", "gpt")[index % 2]:
            raise BadRow("bad_conversation", f"turn {index}: expected {('human', 'gpt')[index % 2]}, got {speaker[:40]!r}")
    return [(ROLES[speaker], text) for speaker, text in turns]


def take_placeholder(text: str, mark: str) -> tuple[str, str]:
    """The first turn without its placeholder `mark` and the newline next to it, and the placeholder's position.

    LLaVA moves a placeholder from inside a sentence to the front, so its position is `before`. Only one placeholder is removed:
    any other occurrence of `mark` is the user's own text.
    """
    if text.lstrip().startswith(mark):
        head, tail = text.split(mark, 1)
        return head + tail.removeprefix("\r").removeprefix("\n"), "before"
    if text.rstrip().endswith(mark):
        head, tail = text.rsplit(mark, 1)
        return head.removesuffix("\n").removesuffix("\r") + tail, "after"
    if mark in text:
        return text.replace(mark, "", 1), "before"
    return text, "none"


FORMAT = Format(read)
