"""Video-ChatGPT's JSON list: a row is a question about an ActivityNet video.

    {"q": "What does the man do after the jump?", "a": "He waves to the crowd.", "video_id": "v_AbCdEfGhIjK"}

The video's file is the id, or `v_` and the id, with one of the video extensions; an extension in the id is dropped.
`category` goes to its column, further keys to `extra`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from voco.ingest.formats import Format
from voco.ingest.parsing import json_list
from voco.ingest.source_row import BadRow, Reject, SourceRow, category_and_extra, make_source_row, parse_rows
from voco.job.config import Ingest
from voco.video.extensions import VIDEO_EXTENSIONS

MARKER = "QA_GT_caption_based_noisy"  # the making of the set left it in some answers
OWN_KEYS = {"q", "a", "video_id"}


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row of the file, in order. Raises Refused when the file is not one JSON list."""
    return parse_rows(uri, json_list.iterate_list(uri), lambda raw, index, source: parse(raw, index, source, block))


def parse(raw: Any, index: int, source: str, block: Ingest) -> SourceRow:
    """Row `index` of the file as a SourceRow. Raises BadRow for its first fault."""
    if not isinstance(raw, dict):
        raise BadRow("bad_record", f"expected an object, got {type(raw).__name__}")
    for key in ("q", "a", "video_id"):
        if not isinstance(raw.get(key), str):
            raise BadRow("bad_record", f"{key}: expected a string, got {type(raw.get(key)).__name__}")
    category, extra = category_and_extra(raw, OWN_KEYS)
    if not raw["q"].strip():  # `make_source_row` allows an empty question that was the placeholder alone
        raise BadRow("empty_text", "q has no text")
    return make_source_row(
        source, block, modality="video", path=video_stem(raw["video_id"]),
        turns=[("user", raw["q"]), ("assistant", clean_answer(raw["a"]))],
        placeholder="before" if index % 2 else "after",  # by the row's number, as in Video-ChatGPT's converter
        source_id=raw["video_id"], category=category, extra=extra,
    )  # fmt: skip


def video_stem(video_id: str) -> str:
    """The video's path without its extension, which differs between copies of ActivityNet. Raises BadRow for an empty id."""
    name = video_id.strip()
    for extension in VIDEO_EXTENSIONS:
        name = name.removesuffix(extension)
    if not name.removeprefix("v_"):
        raise BadRow("bad_record", f"video_id: expected an id, got {video_id[:40]!r}")
    return name


def clean_answer(answer: str) -> str:
    """The answer without stray markers and the white space around them."""
    if MARKER not in answer:
        return answer
    return " ".join(part for piece in answer.split(MARKER) if (part := piece.strip()))


FORMAT = Format(read, missing_share=1.0)
