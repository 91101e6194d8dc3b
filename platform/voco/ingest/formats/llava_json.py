"""LLaVA's rows, as one JSON list or one object a line: a conversation about images, one video or text only.

    {"id": "000000123456", "image": "coco/train2017/000000123456.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is on the shelf?"}, {"from": "gpt", "value": "A teapot"}]}
    {"id": 1012345678, "video": "012301_012350/1012345678.mp4", "conversations": [...]}

`id` is a string or an integer; it may be absent and may repeat. `image` is a path or a list of paths, with one `<image>` in the
human's turns for each. A row without `image` and `video` is text only. Speakers may also be called user and assistant; a first
turn of the system goes to `extra` and is counted. A video's placeholder is `<image>`, as in LLaMA-VID, or `<video>`, as in
Video-ChatGPT. Video-ChatGPT's `.pkl` (features of a video) means the video itself, looked up with every video extension, and its
stray marker is removed from the answers. `category` goes to its column, further keys to `extra`. LLaVA's 665k mix, CC3M's
`chat.json` and LLaMA-VID's mixes with WebVid and Video-ChatGPT are such files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from voco.ingest.chat_rows import (
    IMAGE,
    ROLES,
    VIDEO,
    Turns,
    alternate,
    paths_of,
    row_identity,
    single_modality,
    take_placeholders,
)
from voco.ingest.formats import Format
from voco.ingest.formats.video_chatgpt import clean_answer
from voco.ingest.layouts import advice
from voco.ingest.parsing.json_rows import as_object, iterate_rows
from voco.ingest.source_row import BadRow, Reject, SourceRow, category_and_extra, make_source_row, parse_rows
from voco.job.config import Ingest

FEATURES = ".pkl"
OWN_KEYS = {"id", "image", "video", "conversations"}


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row of the file, in order. Raises Refused when the file is neither a JSON list nor JSON lines."""
    return parse_rows(uri, iterate_rows(uri), lambda raw, _, source: parse(raw, source, block))


def parse(raw: Any, source: str, block: Ingest) -> SourceRow:
    """One row as a SourceRow. Raises BadRow for its first fault."""
    raw = as_object(raw)
    images, videos = paths_of(raw.get("image"), "image"), paths_of(raw.get("video"), "video")
    modality, paths = single_modality(images, [video.removesuffix(FEATURES) for video in videos])
    turns, system = alternate(_turns(raw))
    category, extra = category_and_extra(raw, OWN_KEYS)
    says_video = modality != "image" and any(VIDEO in text for role, text in turns if role == "user")
    turns, placeholder = take_placeholders(turns, VIDEO if says_video else IMAGE, len(paths), raw)
    if modality == "video":
        turns = [(role, clean_answer(text) if role == "assistant" else text) for role, text in turns]
    return make_source_row(
        source, block, modality=modality, paths=paths, turns=turns, placeholder=placeholder,
        source_id=row_identity(raw), category=category, extra=extra, system=system,
    )  # fmt: skip


def _turns(raw: dict[str, Any]) -> Turns:
    """(role, text) of every turn."""
    listed = raw.get("conversations")
    if not isinstance(listed, list):
        hint = advice(raw, "llava_json")
        raise BadRow("bad_record", f"conversations: expected a list, got {type(listed).__name__}{hint}")
    turns: Turns = []
    for index, turn in enumerate(listed):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            raise BadRow("bad_record", f"conversations[{index}]: expected an object with `from` and `value` strings")
        if turn["from"] not in ROLES:
            raise BadRow("bad_conversation", f"turn {index}: expected human or gpt, got {turn['from'][:40]!r}")
        turns.append((ROLES[turn["from"]], turn["value"]))
    return turns


FORMAT = Format(read)
