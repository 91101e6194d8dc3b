"""WebVid's CSV: a row is a caption of the video at `<page_dir>/<videoid>.mp4`, or at `<videoid>.mp4` in one flat folder.

    videoid,name,page_idx,page_dir,duration,contentUrl
    1012345678,"Boat leaving a small harbour, dawn",12345,012301_012350,PT00H00M14S,https://host/1012345678/x.mp4

`name` is the caption. As in LLaMA-VID, it becomes the answer to a short request to describe the video, and the placeholder
follows the request. `duration`, `contentUrl` and columns of any other name go to `extra`. Quoting is that of Python's csv
module: a quoted caption may contain commas, doubled quotes and line breaks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

from voco.errors import Refused
from voco.ingest.captions import video_request
from voco.ingest.formats import Format
from voco.ingest.source_row import BadRow, Reject, SourceRow, make_source_row, parse_rows
from voco.job.config import Ingest
from voco.store import storage

NEEDED = ("videoid", "name", "page_dir")
OWN_COLUMNS = {*NEEDED, "page_idx"}  # page_dir contains page_idx
LINE_CHARACTERS = 1 << 20  # read at a time: a file without line ends must not fill the memory


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row below the header, in order. Raises Refused for a file without a header that has the NEEDED columns."""
    # Bytes that are not UTF-8 become lone surrogates, which `make_source_row` rejects: this costs the row, not the file
    decoding: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    with storage.open_read(uri) as handle, io.TextIOWrapper(handle, **decoding) as text:
        rows = csv.reader(iter(partial(text.readline, LINE_CHARACTERS), ""))
        header = _header(uri, rows)
        yield from parse_rows(uri, _fields(rows), lambda raw, _, source: parse(raw, header, source, block))


def _header(uri: str, rows: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise Refused(f"inputs.annotations: {uri}: the header cannot be read: {error}") from error
    if not set(NEEDED) <= set(header) or len(set(header)) < len(header):
        shown = ",".join(header).encode("utf-8", "replace")[:80]
        raise Refused(f"inputs.annotations: {uri}: expected a header with {', '.join(NEEDED)}, each once, got {shown!r}")
    return header


def _fields(rows: Iterator[list[str]]) -> Iterator[list[str] | csv.Error]:
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # an endless field; the reader continues with the next line
            yield error
            continue
        if fields:  # an empty line is no row
            yield fields


def parse(raw: list[str] | csv.Error, header: list[str], source: str, block: Ingest) -> SourceRow:
    """One row's fields as a SourceRow. Raises BadRow for its first fault."""
    if isinstance(raw, csv.Error):
        raise BadRow("bad_record", str(raw))
    if len(raw) != len(header):
        raise BadRow("bad_record", f"expected {len(header)} fields, got {len(raw)}")
    row: dict[str, Any] = dict(zip(header, raw, strict=True))
    for name, value in row.items():
        if "\0" in value:
            raise BadRow("bad_record", f"{name}: has a NUL character")
    identity, folder = row["videoid"].strip(), row["page_dir"].strip()
    if not identity or not folder:
        raise BadRow("bad_record", f"{'page_dir' if identity else 'videoid'}: expected a value, got nothing")
    turns = [("user", video_request(identity)), ("assistant", row["name"].strip())]
    extra = {name: value for name, value in row.items() if name not in OWN_COLUMNS}
    return make_source_row(
        source, block, modality="video", path=f"{folder}/{identity}.mp4", turns=turns, placeholder="after",
        source_id=identity, extra=extra,
    )  # fmt: skip


FORMAT = Format(read, missing_share=1.0)
