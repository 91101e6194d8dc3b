"""A JSON file that is one list, parsed as a stream: only one row and a window of the file are in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from voco.errors import Refused, message_line
from voco.store import storage

WINDOW_BYTES = 4 << 20  # read at a time; while a row is incomplete, each read doubles the text in memory
ROW_CHARACTERS = 1 << 30  # a longer row counts as one without an end
EDGE_CHARACTERS = 16  # a fault, or the end of a number, this close to the window's end may only mean that more text follows
SPACE = re.compile(r"[ \t\n\r]*")


def iterate_list(uri: str) -> Iterator[Any]:
    """Every element of the list, in order. Raises Refused when the file is not one complete JSON list in UTF-8."""
    with storage.open_read(uri) as handle:
        yield from _objects(uri, handle)


def _objects(uri: str, handle: IO[bytes]) -> Iterator[Any]:
    start = handle.read(64)
    skipped = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    if start[skipped:].lstrip()[:1] != b"[":
        raise Refused(f"inputs.annotations: {uri}: expected a JSON list that starts with [, got {start[:20]!r}")
    handle.seek(skipped)
    count = 0
    try:
        for raw in _elements(_Window(handle)):
            count += 1
            yield raw
    except (_NotJson, UnicodeDecodeError, RecursionError) as error:
        text = message_line(error)
        raise Refused(f"inputs.annotations: {uri}: expected complete JSON, got a fault after row {count - 1}: {text}") from error


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
        raise _NotJson(f"text after the list: {window.text[window.at :][:20]!r}")


class _Window:
    """A part of the file as text and a position in it; the standard library's parser runs over it."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle = handle
        self.text, self.at, self.ended = "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.parse = json.JSONDecoder(parse_constant=_no_constant).raw_decode

    def peek(self) -> str:
        """The next character other than white space, "" at the end of the file."""
        while True:
            if self.at < len(self.text) and (mark := self.text[self.at]) not in " \t\n\r":
                return mark
            space = SPACE.match(self.text, self.at)
            assert space is not None
            self.at = space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self._extend()

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.parse(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - EDGE_CHARACTERS
                if self.ended or not cut or len(self.text) - self.at > ROW_CHARACTERS:
                    raise _NotJson(error.msg) from error
            else:
                if end + EDGE_CHARACTERS <= len(self.text) or self.ended:  # else a number may continue beyond the window
                    self.at = end
                    return value
            self._extend()

    def _extend(self) -> None:
        size = max(WINDOW_BYTES, len(self.text) - self.at)
        data = self.handle.read(size)
        self.ended = len(data) < size
        self.text, self.at = self.text[self.at :] + self.decoder.decode(data, final=self.ended), 0


def _no_constant(name: str) -> Any:
    raise _NotJson(f"{name} is not JSON")
