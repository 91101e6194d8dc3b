"""JSON files that hold records in one of three layouts, found by their content and parsed as a stream.

{"question_id": 7, "answer": "yes"}                      one record a line
[{"question_id": 7, "answer": "yes"}, ...]               a list, or under one of LISTS in an object
{"2049": {"question": "Is it dry?", "answer": "yes"}}    an object of records by their id
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import IO, Any

import ijson

from voco.errors import Refused
from voco.store import storage

LISTS = ("annotations", "data", "questions")  # VQAv2, TextVQA, SEED-Bench
ITSELF = "item"  # the prefix of a file that is a list, as ijson calls it
BY_ID, LINES = "", "lines"
LINE = 64 << 20  # bytes of one line; a longer one is cut, and so is no JSON


def detect_layout(uri: str, key: str) -> str:
    """LINES, BY_ID, ITSELF or a name of LISTS. Raises Refused, naming `key`, for a file that is none of them."""
    with storage.open_read(uri) as handle:
        top = ""
        try:
            for prefix, event, value in ijson.parse(_after_mark(handle), use_float=True):
                if prefix == "" and event == "start_array":
                    return ITSELF
                if prefix == "" and event == "map_key":
                    top = value
                elif prefix == top and event == "start_array" and top in LISTS:
                    return top
                elif prefix == top and event == "map_key" and value in ("answer", "answers"):
                    return BY_ID
                elif prefix == "" and event == "end_map":
                    return LINES
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise Refused(f"{key}: {uri}: expected JSON or JSON lines: {_line(error)}") from error
    raise Refused(f"{key}: {uri}: expected JSON or JSON lines, got nothing")


def iterate_records(uri: str, key: str, kind: str) -> Iterator[tuple[str, Any]]:
    """Every record with its id, which is "" unless the file is BY_ID. A line that is no JSON is passed over.

    Raises Refused, naming `key`, for a file that ends early.
    """
    if kind == LINES:
        for line in iterate_lines(uri):
            try:
                yield "", json.loads(line)
            except (ValueError, RecursionError):
                continue
        return
    with storage.open_read(uri) as handle:
        stream = _after_mark(handle)
        try:
            if kind == BY_ID:
                yield from ijson.kvitems(stream, "", use_float=True)
            else:
                prefix = kind if kind == ITSELF else f"{kind}.item"
                yield from (("", record) for record in ijson.items(stream, prefix, use_float=True))
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise Refused(f"{key}: {uri}: not whole JSON: {_line(error)}") from error


def iterate_lines(uri: str) -> Iterator[bytes]:
    """Every line that is not empty."""
    with storage.open_read(uri) as handle:
        stream = io.BufferedReader(_after_mark(handle))  # type: ignore[type-var]  # a file in S3 has no limit on a line
        while line := stream.readline(LINE):
            if line.strip():
                yield line


def _after_mark(handle: IO[bytes]) -> IO[bytes]:
    """The file behind its byte order mark, if it has one."""
    handle.seek(3 if handle.read(3) == b"\xef\xbb\xbf" else 0)
    return handle


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
