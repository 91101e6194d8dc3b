"""Video-ChatGPT's JSON list: one row is one question about one ActivityNet video.

    {"q": "What does the man do after the jump?", "a": "He waves to the crowd.", "video_id": "v_AbCdEfGhIjK"}

The video's file is the id, or `v_` and the id, with one of several extensions; an extension in the id is dropped.
`category` goes to its column, further keys to `extra`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from voco.ingest.media.video import EXTENSIONS
from voco.ingest.parsing import json_list
from voco.ingest.source_row import BadRow, Reject, SourceRow, make_source_row, parse_rows
from voco.job.config import Ingest

MARKER = "QA_GT_caption_based_noisy"  # left in some answers by the set's own making
OWN_KEYS = {"q", "a", "video_id"}


def read(uri: str, block: Ingest) -> Iterator[SourceRow | Reject]:
    """Every row of the file, in order. Raises Refused when the file is not one JSON list."""
    return parse_rows(uri, json_list.iterate_list(uri), lambda raw, index, source: parse(raw, index, source, block))


def parse(raw: Any, index: int, source: str, block: Ingest) -> SourceRow:
    """Row `index` of the file as an item. Raises BadRow with the first thing that is wrong with it."""
    if not isinstance(raw, dict):
        raise BadRow("bad_record", f"expected an object, got {type(raw).__name__}")
    for key in ("q", "a", "video_id"):
        if not isinstance(raw.get(key), str):
            raise BadRow("bad_record", f"{key}: expected a string, got {type(raw.get(key)).__name__}")
    category, extra = json_list.category_and_extra(raw, OWN_KEYS)
    if not raw["q"].strip():  # the placeholder is not in the text, so an empty question is never the placeholder alone
        raise BadRow("empty_text", "q has no text")
    return make_source_row(
        source, block, modality="video", path=video_stem(raw["video_id"]), turns=[("user", raw["q"]), ("assistant", clean_answer(raw["a"]))],
        # Video-ChatGPT's converter puts the placeholder by the row's number.
        placeholder="before" if index % 2 else "after", source_id=raw["video_id"], category=category, extra=extra,
    )  # fmt: skip


def video_stem(video_id: str) -> str:
    """The video's path without its extension, which differs between copies of ActivityNet. Raises BadRow for no id."""
    name = video_id.strip()
    for extension in EXTENSIONS:
        name = name.removesuffix(extension)
    if not name.removeprefix("v_"):
        raise BadRow("bad_record", f"video_id: expected an id, got {video_id[:40]!r}")
    return name


def clean_answer(answer: str) -> str:
    """The answer without stray markers and the white space around them."""
    if MARKER not in answer:
        return answer
    return " ".join(part for piece in answer.split(MARKER) if (part := piece.strip()))
