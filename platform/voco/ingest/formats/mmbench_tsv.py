"""MMBench's TSV: a row is a multiple choice question and its image in base64.

    index  question  hint  A  B  C  D  answer  category  image  source  l2-category  comment  split

The prompt is LLaVA's: the hint, the question, the options up to the first empty one, the instruction. `nan` and `none` are
empty. The answer is the option's letter. Rows with equal images, and rows that name another row's index as their image, become
one sample under the first row's index: CircularEval's rotated questions share an image. Columns of any other name go to `extra`.
The listing keeps no images; a worker reads each one from the file by the offset of its row.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from voco.errors import Refused, message_line
from voco.ingest.evaluation_row import LETTERS, EvaluationQuestion, make_evaluation_row, with_options
from voco.ingest.formats import Format
from voco.ingest.media.source import MediaSource, check_size
from voco.ingest.source_row import BadRow, Reject, SourceRow, parse_rows
from voco.job.config import Ingest
from voco.store import storage

NEEDED = ("index", "question", "A", "image")
FIELD_CHARACTERS = 64 << 20  # most characters of one field: csv's default limit is smaller than an image
INDEX_CHARACTERS = 64  # a shorter image field is the index of the row that has the image
OWN_COLUMNS = {"index", "question", "hint", "answer", "category", "image", *LETTERS}

Fields = list[str] | csv.Error


@dataclass(frozen=True)
class TsvRow:
    """One row's fields, and the first byte and size of the row in the file."""

    fields: Fields
    start: int
    size: int


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row below the header, in order. Raises Refused for a file without a header that has the NEEDED columns."""
    with storage.open_read(uri) as handle:
        rows = _rows(handle)
        top = next(rows, TsvRow([], 0, 0))
        header = [] if isinstance(top.fields, csv.Error) else [name.strip() for name in top.fields]
        if not set(NEEDED) <= set(header) or len(set(header)) < len(header):
            shown = ",".join(header).encode("utf-8", "replace")[:80]
            needed = ", ".join(NEEDED)
            raise Refused(f"inputs.annotations: {uri}: expected a header with {needed}, each once, got {shown!r}")
        images = _Images(header.index("image"))
        yield from parse_rows(uri, rows, lambda row, _, source: parse(row, header, images, source, block))


def parse(row: TsvRow, header: list[str], images: _Images, source: str, block: Ingest) -> SourceRow:
    """One row as a SourceRow. Raises BadRow for its first fault."""
    if isinstance(row.fields, csv.Error):
        raise BadRow("bad_record", str(row.fields))
    if len(row.fields) != len(header):
        raise BadRow("bad_record", f"expected {len(header)} fields, got {len(row.fields)}")
    values = {name: field_text(value) for name, value in zip(header, row.fields, strict=True)}
    index = values["index"]
    if not index:
        raise BadRow("bad_record", "index: expected a value, got nothing")
    path, location = images.locate(index, values["image"], row)  # even if this row is rejected: others may refer to its image
    for name, value in values.items():
        if "\0" in value:
            raise BadRow("bad_record", f"{name!r}: has a NUL character")
    if not values["question"]:
        raise BadRow("empty_text", "the question has no text")
    choices = _choices(values)
    answer = values.get("answer", "").upper()
    if answer and answer not in tuple(LETTERS[: len(choices)]):
        raise BadRow("bad_record", f"answer: expected the letter of one of {len(choices)} options, got {answer[:40]!r}")
    text = "\n".join(part for part in (values.get("hint", ""), values["question"]) if part)
    extra = {name: value for name, value in values.items() if name not in OWN_COLUMNS and value}
    question = EvaluationQuestion(with_options(text, choices), [answer], index, values.get("category", ""), choices, extra)
    return make_evaluation_row(source, block, question, "image", path, location)


def field_text(value: str) -> str:
    """A field without surrounding white space; "" for what spreadsheets write into an empty one."""
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
    """Path and location of every image in the rows so far, by the rows' indexes and by content."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.by_index: dict[str, tuple[str, str]] = {}
        self.by_content: dict[bytes, tuple[str, str]] = {}

    def locate(self, index: str, image: str, row: TsvRow) -> tuple[str, str]:
        """Path and location of a row's image. Raises BadRow when it has none."""
        if not image:
            raise BadRow("missing_media", "image: the field is empty")
        if len(image) < INDEX_CHARACTERS:
            if image not in self.by_index:
                raise BadRow("missing_media", f"image: no row above has index {image!r}")
            located = self.by_index[image]
        else:
            digest = hashlib.sha256(image.encode("utf-8", "surrogateescape")).digest()
            located = self.by_content.setdefault(digest, (index, f"{row.start}:{row.size}:{self.column}"))
        self.by_index.setdefault(index, located)
        return located


def _rows(handle: IO[bytes]) -> Iterator[TsvRow]:
    """The rows of the file with their offsets. The fields of a row that csv cannot read are its error."""
    at = 0
    stream = io.BufferedReader(handle)  # type: ignore[type-var]  # a file in S3 has no readline with a limit

    def lines() -> Iterator[str]:
        nonlocal at
        while line := stream.readline(FIELD_CHARACTERS):
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
    with _field_limit:
        before = csv.field_size_limit(FIELD_CHARACTERS)  # the limit is global to the process
        try:
            return call()
        finally:
            csv.field_size_limit(before)


_field_limit = threading.Lock()


class TsvImages:
    """The images of a TSV, each by its location: first byte and size of the row, and the image's column."""

    def __init__(self, uri: str) -> None:
        self.fs, self.path = storage.filesystem(uri)
        self.concurrent = not isinstance(self.fs, LocalFileSystem)

    def sources(self, locations: list[str]) -> Iterator[MediaSource]:
        """The source of each location, in order."""
        for location in locations:
            start, size, column = map(int, location.split(":"))
            yield _TsvImage(self, start, size, column)

    def read(self, start: int, size: int) -> bytes:
        return storage.read_range(self.fs, self.path, start, size)


@dataclass(frozen=True)
class _TsvImage:
    file: TsvImages
    start: int
    size: int
    column: int

    def read(self, path: str, limit: int) -> bytes:
        """The decoded base64. Raises BadRow: media_too_large, corrupt_media (no base64, or the file has changed)."""
        text = self.file.read(self.start, self.size).decode("utf-8-sig", "surrogateescape")
        try:
            fields = _with_long_fields(lambda: next(csv.reader(io.StringIO(text, newline=""), delimiter="\t")))
            image = fields[self.column].strip()
            data = base64.b64decode(image, validate=True)
        except (csv.Error, StopIteration, IndexError, binascii.Error, ValueError) as error:
            raise BadRow("corrupt_media", f"{path}: not base64: {message_line(error, 120)}") from error
        check_size(path, len(data), limit)
        return data


FORMAT = Format(read, open_media=lambda block, annotations: TsvImages(annotations))
