"""LLaVA's JSON list: one row is one conversation about at most one image.

    {"id": "000000123456", "image": "coco/train2017/000000123456.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is on the shelf?"}, {"from": "gpt", "value": "A teapot"}]}

`id` is a string or an integer, may be absent and may repeat. Without `image` the row is text only. Further keys go to
`extra`, `category` to its column. The list is parsed as a stream: one row is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

import ijson

from voco import storage
from voco.errors import Refused
from voco.ingest.items import BadRow, Item, Reject, normal_path
from voco.spec import Ingest

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
OWN_KEYS = {"id", "image", "conversations", "category"}
EVALUATION = {"val", "test"}  # splits whose last answer is a reference, not text


def read(uri: str, block: Ingest) -> Iterator[Item | Reject]:
    """Every row of the file, in order. Raises Refused when the file is not one JSON list."""
    name = uri.rsplit("/", 1)[-1]
    with storage.open_read(uri) as handle:
        for index, raw in enumerate(_objects(uri, handle)):
            source = f"{name}:{index}"
            try:
                yield parse(raw, source, block)
            except BadRow as bad:
                yield Reject(source, bad.reason, bad.detail)


def _objects(uri: str, handle: IO[bytes]) -> Iterator[Any]:
    start = handle.read(64)
    skipped = 3 if start.startswith(b"\xef\xbb\xbf") else 0
    if start[skipped:].lstrip()[:1] != b"[":
        raise Refused(f"inputs.annotations: {uri}: expected a JSON list that starts with [, got {start[:20]!r}")
    handle.seek(skipped)
    rows = ijson.items(handle, "item", use_float=True)
    count = 0
    while True:
        try:
            raw = next(rows)
        except StopIteration:
            break
        except (ijson.JSONError, UnicodeDecodeError) as error:
            text = " ".join(str(error).split())[:200]
            raise Refused(f"inputs.annotations: {uri}: not whole JSON after row {count - 1}: {text}") from error
        count += 1
        yield raw


def parse(raw: Any, source: str, block: Ingest) -> Item:
    """One row as an item. Raises BadRow with the first thing that is wrong with it."""
    if not isinstance(raw, dict):
        raise BadRow("bad_record", f"expected an object, got {type(raw).__name__}")
    path = _image(raw)
    turns = _turns(raw)
    extra = {key: value for key, value in raw.items() if key not in OWN_KEYS}
    category = raw.get("category", "")
    if not isinstance(category, str):
        extra["category"], category = category, ""
    identity = _identity(raw)
    notes = json.dumps(extra, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    _check_text([identity, category, notes, path or "", *(text for _, text in turns)], block.max_text_bytes)
    placeholder = "none"
    if path is not None:
        first, placeholder = take_placeholder(turns[0][1])
        turns = [("user", first), *turns[1:]]
    _check_turns(turns, placeholder != "none", block.split in EVALUATION)
    spoken, answers = turns, []
    if block.split in EVALUATION and turns[-1][0] == "assistant":
        spoken, answers = turns[:-1], [turns[-1][1]]
    conversation = {
        "source_id": identity,
        "turns": [{"role": role, "text": text} for role, text in spoken],
        "placeholder": placeholder,
        "answers": answers,
        "choices": [],
        "category": category,
        "extra": notes,
    }
    paths = () if path is None else (normal_path(path),)
    return Item(source, "text" if path is None else "image", paths, tuple(turns), conversation)


def _identity(raw: dict[str, Any]) -> str:
    value = raw.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("bad_record", f"id: expected a string or an integer, got {type(value).__name__}")
    return str(value)


def _image(raw: dict[str, Any]) -> str | None:
    if "video" in raw:
        raise BadRow("unsupported_format", "video: llava_json reads images and text only")
    value = raw.get("image")
    if value is not None and not isinstance(value, str):
        raise BadRow("bad_record", f"image: expected one path, got {type(value).__name__}")
    return value


def _turns(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of every turn; a leading turn that is not the human's is dropped, as LLaVA does."""
    listed = raw.get("conversations")
    if not isinstance(listed, list):
        raise BadRow("bad_record", f"conversations: expected a list, got {type(listed).__name__}")
    spoken: list[tuple[str, str]] = []
    for index, turn in enumerate(listed):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            raise BadRow("bad_record", f"conversations[{index}]: expected an object with `from` and `value` strings")
        spoken.append((turn["from"], turn["value"]))
    if spoken and spoken[0][0] != "human":
        spoken = spoken[1:]
    if not spoken:
        raise BadRow("bad_conversation", "there is no human turn")
    for index, (speaker, _) in enumerate(spoken):
        if speaker != ("human", "gpt")[index % 2]:
            raise BadRow("bad_conversation", f"turn {index}: expected {('human', 'gpt')[index % 2]}, got {speaker[:40]!r}")
    return [(ROLES[speaker], text) for speaker, text in spoken]


def take_placeholder(text: str) -> tuple[str, str]:
    """The first turn without its placeholder and the one newline that joins it, and where it stood.

    LLaVA moves a placeholder inside a sentence to the front, so that one counts as `before`. Only one is taken: whatever
    else spells `<image>` is the user's own text.
    """
    if text.lstrip().startswith(PLACEHOLDER):
        head, tail = text.split(PLACEHOLDER, 1)
        return head + tail.removeprefix("\r").removeprefix("\n"), "before"
    if text.rstrip().endswith(PLACEHOLDER):
        head, tail = text.rsplit(PLACEHOLDER, 1)
        return head.removesuffix("\n").removesuffix("\r") + tail, "after"
    if PLACEHOLDER in text:
        return text.replace(PLACEHOLDER, "", 1), "before"
    return text, "none"


def _check_text(texts: list[str], limit: int) -> None:
    try:
        size = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError as error:  # a lone surrogate: no UTF-8 file can hold it
        raise BadRow("bad_record", f"text that is not Unicode: {error.reason}") from error
    if size > limit:
        raise BadRow("text_too_large", f"{size} bytes of text, more than ingest.max_text_bytes {limit}")


def _check_turns(turns: list[tuple[str, str]], placeholder: bool, evaluation: bool) -> None:
    for index, (role, text) in enumerate(turns):
        # A first turn that was the placeholder alone is LLaVA's way to write "caption this".
        if not text.strip() and not (index == 0 and placeholder):
            raise BadRow("empty_text", f"turn {index} ({role}) has no text")
    if len(turns) == 1 and not evaluation:
        raise BadRow("bad_conversation", "there is no answer to learn from")
