"""JSON files of records in one of three layouts, recognised by their content and parsed as a stream.

{"question_id": 7, "answer": "yes"}                      one record a line
[{"question_id": 7, "answer": "yes"}, ...]               a list, alone or in an object under one of LISTS
{"2049": {"question": "Is it dry?", "answer": "yes"}}    an object of records by their id
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import IO, Any

import ijson

from voco.errors import Refused, message_line
from voco.store import storage

ANNOTATIONS, DATA, QUESTIONS = LISTS = ("annotations", "data", "questions")  # VQAv2's answers, TextVQA, VQAv2 and SEED-Bench
ITSELF = "item"  # the file is a list; ijson's prefix of its elements
BY_ID, LINES = "", "lines"  # the file is an object of records by id; a record a line
RECORD_KEYS = ("answer", "answers")  # one of them shows that an object inside the file is a record
QUESTION_KEY = "question"  # the same, in the first object only: sets without answers
LINE_BYTES = 64 << 20  # most bytes of a line; a longer one is cut, so it is no longer JSON


def detect_layout(uri: str, key: str) -> str:
    """LINES, BY_ID, ITSELF or a name of LISTS. Raises Refused at `key` for a file in none of the layouts."""
    with storage.open_read(uri) as handle:
        top: str | None = None
        first: str | None = None
        try:
            for prefix, event, value in ijson.parse(_after_mark(handle), use_float=True):
                if prefix == "" and event == "start_array":
                    return ITSELF
                if prefix == "" and event == "map_key":
                    top, first = value, value if first is None else first
                elif prefix == top and event == "start_array" and top in LISTS:
                    return top
                elif prefix == top and event == "map_key" and (value in RECORD_KEYS or (top == first and value == QUESTION_KEY)):
                    return BY_ID
                elif prefix == "" and event == "end_map":
                    return LINES
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise Refused(f"{key}: {uri}: expected JSON or JSON lines: {message_line(error)}") from error
    raise Refused(f"{key}: {uri}: expected JSON or JSON lines, got nothing")


def iterate_records(uri: str, key: str, kind: str) -> Iterator[tuple[str, Any]]:
    """Every record with its id, which is "" unless the file is BY_ID. Skips lines that are not JSON.

    Raises Refused at `key` for a file that ends early.
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
            raise Refused(f"{key}: {uri}: expected complete JSON: {message_line(error)}") from error


def iterate_lines(uri: str) -> Iterator[bytes]:
    """Every line that is not empty."""
    with storage.open_read(uri) as handle:
        stream = io.BufferedReader(_after_mark(handle))  # type: ignore[type-var]  # a file in S3 has no readline with a limit
        while line := stream.readline(LINE_BYTES):
            if line.strip():
                yield line


def parse_line(line: bytes) -> Any:
    """The content of a line of strict JSON. Raises ValueError or RecursionError."""
    return json.loads(line, parse_constant=_reject_constant)


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is a number in Python, not in JSON")


def _after_mark(handle: IO[bytes]) -> IO[bytes]:
    """The file after its byte order mark, if it has one."""
    mark = codecs.BOM_UTF8
    handle.seek(len(mark) if handle.read(len(mark)) == mark else 0)
    return handle
