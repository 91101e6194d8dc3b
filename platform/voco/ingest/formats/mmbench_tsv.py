"""MMBench's TSV: one row is one multiple choice question, and its image is in the row, in base64.

    index  question  hint  A  B  C  D  answer  category  image  source  l2-category  comment  split

As LLaVA asks it: the hint, the question, the options up to the first empty one, the instruction. `nan` and `none` are empty.
The answer is the option's letter. Equal images, and rows whose image is another row's index, are one sample under the index of
the first: CircularEval's turned questions share it. Columns of any other name go to `extra`. Images are not kept while the
rows are listed; a worker reads them from the file by the place of their row.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from voco.errors import Refused
from voco.ingest.answer_keys import LETTERS, EvaluationQuestion, make_evaluation_row, with_options
from voco.ingest.media.image import MediaSource, check_size
from voco.ingest.source_row import BadRow, Reject, SourceRow, parse_rows
from voco.job.config import Ingest
from voco.store import storage

NEEDED = ("index", "question", "A", "image")
FIELD = 64 << 20  # characters of one field: csv's own limit is less than an image
INDEX = 64  # an image field that is shorter is the index of the row that has the image
SPOKEN = {"index", "question", "hint", "answer", "category", "image", *LETTERS}

Fields = list[str] | csv.Error


@dataclass(frozen=True)
class TsvRow:
    """One row's fields and where its bytes lie in the file."""

    fields: Fields
    start: int
    size: int


def read(uri: str, block: Ingest) -> Iterator[SourceRow | Reject]:
    """Every row below the header, in order. Raises Refused when there is no header with the columns that are needed."""
    with storage.open_read(uri) as handle:
        rows = _rows(handle)
        first = next(rows, TsvRow([], 0, 0))
        header = [] if isinstance(first.fields, csv.Error) else [name.strip() for name in first.fields]
        if not set(NEEDED) <= set(header) or len(set(header)) < len(header):
            shown = ",".join(header).encode("utf-8", "replace")[:80]
            needed = ", ".join(NEEDED)
            raise Refused(f"inputs.annotations: {uri}: expected a header with {needed}, each once, got {shown!r}")
        images = _Images(header.index("image"))
        yield from parse_rows(uri, rows, lambda row, _, source: parse(row, header, images, source, block))


def parse(row: TsvRow, header: list[str], images: _Images, source: str, block: Ingest) -> SourceRow:
    """One row as an item. Raises BadRow with the first thing that is wrong with it."""
    if isinstance(row.fields, csv.Error):
        raise BadRow("bad_record", str(row.fields))
    if len(row.fields) != len(header):
        raise BadRow("bad_record", f"expected {len(header)} fields, got {len(row.fields)}")
    values = {name: field_text(value) for name, value in zip(header, row.fields, strict=True)}
    index = values["index"]
    if not index:
        raise BadRow("bad_record", "index: expected a value, got nothing")
    path, place = images.of(index, values["image"], row)  # before anything else: others may refer to it
    for name, value in values.items():
        if "\0" in value:
            raise BadRow("bad_record", f"{name!r}: holds a NUL")
    if not values["question"]:
        raise BadRow("empty_text", "the question has no text")
    choices = _choices(values)
    answer = values.get("answer", "").upper()
    if answer and answer not in tuple(LETTERS[: len(choices)]):
        raise BadRow("bad_record", f"answer: expected the letter of one of {len(choices)} options, got {answer[:40]!r}")
    asked = "\n".join(part for part in (values.get("hint", ""), values["question"]) if part)
    extra = {name: value for name, value in values.items() if name not in SPOKEN and value}
    question = EvaluationQuestion(with_options(asked, choices), [answer], index, values.get("category", ""), choices, extra)
    return make_evaluation_row(source, block, question, "image", path, place)


def field_text(value: str) -> str:
    """A field without white space around it; "" for what spreadsheets write into an empty one."""
    value = value.strip()
    return "" if len(value) <= len("none") and value.lower() in ("nan", "none") else value


def _choices(values: dict[str, str]) -> list[str]:
    choices: list[str] = []
    for letter in LETTERS:
        if not values.get(letter):
            break
        choices.append(values[letter])
    if not choices:
        raise BadRow("bad_record", "A: expected an option, got nothing")
    return choices


class _Images:
    """Which row has the image of which: the paths and places of those seen so far."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.by_index: dict[str, tuple[str, str]] = {}
        self.by_content: dict[bytes, tuple[str, str]] = {}

    def of(self, index: str, image: str, row: TsvRow) -> tuple[str, str]:
        """Path and place of a row's image. Raises BadRow when it has none."""
        if not image:
            raise BadRow("missing_media", "image: the field is empty")
        if len(image) < INDEX:
            if image not in self.by_index:
                raise BadRow("missing_media", f"image: no row above has index {image!r}")
            found = self.by_index[image]
        else:
            digest = hashlib.sha256(image.encode("utf-8", "surrogateescape")).digest()
            found = self.by_content.setdefault(digest, (index, f"{row.start}:{row.size}:{self.column}"))
        self.by_index.setdefault(index, found)
        return found


def _rows(handle: IO[bytes]) -> Iterator[TsvRow]:
    """The rows of the file with their places; a row that csv cannot read is its error."""
    at = 0
    stream = io.BufferedReader(handle)  # type: ignore[type-var]  # a file in S3 has no limit on a line

    def lines() -> Iterator[str]:
        nonlocal at
        while line := stream.readline(FIELD):
            text = line.decode("utf-8-sig" if at == 0 else "utf-8", "surrogateescape")
            at += len(line)
            yield text

    rows = csv.reader(lines(), delimiter="\t")
    while True:
        start = at
        try:
            fields: Fields = _with_long_fields(lambda: next(rows))
        except StopIteration:
            return
        except csv.Error as error:
            fields = error
        if fields:  # an empty line is no row
            yield TsvRow(fields, start, at - start)


def _with_long_fields(call: Callable[[], list[str]]) -> list[str]:
    before = csv.field_size_limit(FIELD)  # one limit for the whole process
    try:
        return call()
    finally:
        csv.field_size_limit(before)


class TsvImages:
    """The images of a TSV, each by the place of its row: first byte, size, column."""

    def __init__(self, uri: str) -> None:
        self.fs, self.path = storage.filesystem(uri)

    def sources(self, places: list[str]) -> Iterator[MediaSource]:
        """A source for each sample, in order."""
        for place in places:
            start, size, column = map(int, place.split(":"))
            yield _OneImage(self, start, size, column)

    def read(self, start: int, size: int) -> bytes:
        if not isinstance(self.fs, LocalFileSystem):
            return bytes(self.fs.cat_file(self.path, start=start, end=start + size))
        with open(self.path, "rb") as handle:
            handle.seek(start)
            return handle.read(size)


@dataclass(frozen=True)
class _OneImage:
    file: TsvImages
    start: int
    size: int
    column: int

    def read(self, path: str, limit: int) -> bytes:
        """The decoded image. Raises BadRow: media_too_large, corrupt_media (no base64, or the file has changed)."""
        text = self.file.read(self.start, self.size).decode("utf-8-sig", "surrogateescape")
        try:
            fields = _with_long_fields(lambda: next(csv.reader(io.StringIO(text, newline=""), delimiter="\t")))
            image = fields[self.column].strip()
            data = base64.b64decode(image, validate=True)
        except (csv.Error, StopIteration, IndexError, binascii.Error, ValueError) as error:
            raise BadRow("corrupt_media", f"{path}: not base64: {' '.join(str(error).split())[:120]}") from error
        check_size(path, len(data), limit)
        return data
