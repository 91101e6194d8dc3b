"""Rows of a JSON file that is one list, or one object a line (JSON lines): told apart by the first character."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from voco.errors import Refused, message_line
from voco.ingest.parsing import json_list, json_records
from voco.ingest.source_row import BadRow
from voco.store import storage


class NotJson(str):
    """A line that is not JSON, as the parser's message."""


def iterate_rows(uri: str) -> Iterator[Any]:
    """Every element of the list, or the content of every line that is not empty; `NotJson` for a line that cannot be parsed.

    Raises Refused for a list that is not complete, and for a file that is neither.
    """
    with storage.open_read(uri) as handle:
        start = handle.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not start.startswith(b"{"):
        return json_list.iterate_list(uri)
    return _lines(uri)


def _lines(uri: str) -> Iterator[Any]:
    for number, line in enumerate(json_records.iterate_lines(uri)):
        try:
            yield json_records.parse_line(line)
        except (ValueError, RecursionError) as error:
            if number == 0:
                expected = "expected a JSON list or one object a line, got a first line that is not complete JSON"
                raise Refused(f"inputs.annotations: {uri}: {expected}: {message_line(error, 120)}") from error
            yield NotJson(message_line(error, 120))


def as_object(raw: Any) -> dict[str, Any]:
    """The row as an object. Raises BadRow(bad_record) for anything else."""
    if isinstance(raw, NotJson):
        raise BadRow("bad_record", f"not JSON: {raw}")
    if not isinstance(raw, dict):
        raise BadRow("bad_record", f"expected an object, got {type(raw).__name__}")
    return raw
