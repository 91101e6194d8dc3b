"""A JSON file that is one list, parsed as a stream: one row is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import ijson

from voco import storage
from voco.errors import Refused


def objects(uri: str) -> Iterator[Any]:
    """Every element of the list, in order. Raises Refused when the file is not one whole JSON list in UTF-8."""
    with storage.open_read(uri) as handle:
        yield from _objects(uri, handle)


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


def category_and_extra(raw: dict[str, Any], own: set[str]) -> tuple[str, dict[str, Any]]:
    """A row's `category` when it is a string, else "", and every key that is neither in `own` nor that category."""
    extra = {key: value for key, value in raw.items() if key not in own and key != "category"}
    category = raw.get("category", "")
    if not isinstance(category, str):
        extra["category"], category = category, ""
    return category, extra
