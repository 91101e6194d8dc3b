"""A format: `image,question,answer`, a line each.

apple.png,What color is it?,red
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from voco.ingest.formats import Format
from voco.ingest.source_row import BadRow, Reject, SourceRow, make_source_row, parse_rows
from voco.job.config import Ingest
from voco.store import storage


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every line, in order."""
    lines = csv.reader(io.StringIO(storage.read_bytes(uri).decode()))
    return parse_rows(uri, lines, lambda line, _, source: parse(line, source, block))


def parse(line: list[str], source: str, block: Ingest) -> SourceRow:
    if len(line) != 3:
        raise BadRow("bad_record", f"expected image, question and answer, got {len(line)} fields")
    image, question, answer = line
    turns = [("user", question), ("assistant", answer)]
    return make_source_row(source, block, modality="image", path=image, turns=turns, placeholder="before")


FORMAT = Format(read)
