"""A JSON file that is one list, parsed as a stream: one row is in memory at a time, and a window of the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from voco.errors import Refused
from voco.store import storage

WINDOW = 4 << 20  # bytes read at a time; as many as are held already while one row lacks its end
ROW = 1 << 30  # characters; a row that is longer is taken for one that has no end
NEAR = 16  # characters; a fault, or the end of a number, so near the window's end may be nothing but that end
SPACE = re.compile(r"[ \t\n\r]*")


def iterate_list(uri: str) -> Iterator[Any]:
    """Every element of the list, in order. Raises Refused when the file is not one whole JSON list in UTF-8."""
    with storage.open_read(uri) as handle:
        yield from _objects(uri, handle)


def _objects(uri: str, handle: IO[bytes]) -> Iterator[Any]:
    start = handle.read(64)
    skipped = 3 if start.startswith(b"\xef\xbb\xbf") else 0
    if start[skipped:].lstrip()[:1] != b"[":
        raise Refused(f"inputs.annotations: {uri}: expected a JSON list that starts with [, got {start[:20]!r}")
    handle.seek(skipped)
    count = 0
    try:
        for raw in _elements(_Window(handle)):
            count += 1
            yield raw
    except (_NotJson, UnicodeDecodeError, RecursionError) as error:
        text = " ".join(str(error).split())[:200]
        raise Refused(f"inputs.annotations: {uri}: not whole JSON after row {count - 1}: {text}") from error


class _NotJson(Exception):
    pass


def _elements(window: _Window) -> Iterator[Any]:
    window.peek()
    window.at += 1
    if window.peek() == "]":
        window.at += 1
    else:
        mark = ","
        while mark == ",":
            yield window.value()
            mark = window.peek()
            window.at += 1
        if mark != "]":
            raise _NotJson(f"expected a comma or ], got {mark!r}" if mark else "the file ends inside the list")
    if window.peek():
        raise _NotJson(f"more behind the list: {window.held[window.at :][:20]!r}")


class _Window:
    """A part of the file as text, and the place in it; the standard library's parser runs over it."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle = handle
        self.held, self.at, self.ended = "", 0, False
        self.text = codecs.getincrementaldecoder("utf-8")()
        self.parse = json.JSONDecoder(parse_constant=_no_constant).raw_decode

    def peek(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        while True:
            if self.at < len(self.held) and (mark := self.held[self.at]) not in " \t\n\r":
                return mark
            found = SPACE.match(self.held, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.held):
                return self.held[self.at]
            if self.ended:
                return ""
            self._more()

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.parse(self.held, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.held) - NEAR
                if self.ended or not cut or len(self.held) - self.at > ROW:
                    raise _NotJson(error.msg) from error
            else:
                if end + NEAR <= len(self.held) or self.ended:  # else a number may go on behind the window
                    self.at = end
                    return value
            self._more()

    def _more(self) -> None:
        size = max(WINDOW, len(self.held) - self.at)
        data = self.handle.read(size)
        self.ended = len(data) < size
        self.held, self.at = self.held[self.at :] + self.text.decode(data, final=self.ended), 0


def _no_constant(name: str) -> Any:
    raise _NotJson(f"{name} is no JSON")


def category_and_extra(raw: dict[str, Any], own: set[str]) -> tuple[str, dict[str, Any]]:
    """A row's `category` when it is a string, else "", and every key that is neither in `own` nor that category."""
    extra = {key: value for key, value in raw.items() if key not in own and key != "category"}
    category = raw.get("category", "")
    if not isinstance(category, str):
        extra["category"], category = category, ""
    return category, extra
