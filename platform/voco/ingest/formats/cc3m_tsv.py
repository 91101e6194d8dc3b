"""Captions and URLs of images, which the job downloads: CC3M's TSV, or a Parquet list as img2dataset takes and writes it.

    a red kite over the beach<TAB>http://example.org/kite.jpg       the TSV has no header
    url: string, caption: string, key: string                       Parquet: a file or a folder; also URL and TEXT, as in LAION

Every line of the TSV is a row, even an empty one: the number of the line is the id in LLaVA's files, `GCC_train_000000017`.
A header would shift every id; it is rejected as a row. A Parquet row's id is its `key`, or its number.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlsplit

import pyarrow as pa

from voco.errors import Refused, message_line
from voco.ingest.captions import image_request
from voco.ingest.formats import Format
from voco.ingest.media.download import DownloadLimits
from voco.ingest.media.parquet_images import PARQUET, file_uris
from voco.ingest.media.web import WebMedia
from voco.ingest.source_row import BadRow, Reject, SourceRow, make_source_row, parse_rows
from voco.job.config import Ingest
from voco.store import parquet, storage

LINE_BYTES = 1 << 20  # a longer line is rejected
URL_CHARACTERS = 8192  # a longer URL is rejected


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row, in order. Raises Refused for Parquet without a column of URLs and one of captions."""
    if uri.endswith(PARQUET) or storage.is_directory(uri):
        first = 0
        for file in file_uris(uri):
            yield from parse_rows(file, _parquet_rows(file), partial(_parse_listed, block, first))
            first += _rows_of(file)
        return
    yield from parse_rows(uri, _lines(uri), lambda raw, index, source: parse(raw, index, source, block))


def _rows_of(uri: str) -> int:
    with parquet.open_parquet(uri) as file:
        return int(file.metadata.num_rows)


def _parquet_rows(uri: str) -> Iterator[tuple[str, str, str]]:
    """Caption, URL and key of every row; "" for null."""
    try:
        with parquet.open_parquet(uri) as file:
            names = {name.lower(): name for name in file.schema_arrow.names}
            url, caption = names.get("url"), names.get("caption") or names.get("text")
            if url is None or caption is None:
                got = ", ".join(file.schema_arrow.names)[:200]
                raise Refused(f"inputs.annotations: {uri}: expected columns url and caption, or URL and TEXT, got {got}")
            columns = [caption, url, *([names["key"]] if "key" in names else [])]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield str(row[caption] or ""), str(row[url] or ""), str(row.get(names.get("key")) or "")
    except (pa.ArrowInvalid, OSError) as error:
        raise Refused(f"inputs.annotations: {uri}: expected a complete Parquet file: {message_line(error)}") from error


def _parse_listed(block: Ingest, first: int, raw: tuple[str, str, str], index: int, source: str) -> SourceRow:
    """A row of a Parquet list; `first` rows are in the files before it."""
    caption, url, key = raw
    return _row(caption.strip(), url.strip(), key or f"{first + index:09d}", source, block)


def _lines(uri: str) -> Iterator[bytes]:
    """Every line; of one that is too long, its first LINE_BYTES."""
    with storage.open_read(uri) as handle:
        first = True
        while line := handle.readline(LINE_BYTES):
            end = line
            while not end.endswith(b"\n") and (piece := handle.readline(LINE_BYTES)):
                end = piece
            yield line.removeprefix(codecs.BOM_UTF8) if first else line
            first = False


def parse(raw: bytes, index: int, source: str, block: Ingest) -> SourceRow:
    """Line `index` as a SourceRow. Raises BadRow for its first fault."""
    if len(raw) == LINE_BYTES and not raw.endswith(b"\n"):
        raise BadRow("bad_record", f"a line of more than {LINE_BYTES} bytes")
    fields = raw.rstrip(b"\r\n").decode("utf-8", "surrogateescape").split("\t")
    if len(fields) != 2:
        raise BadRow("bad_record", f"expected a caption, a tab and a URL, got {len(fields)} fields")
    caption, url = (value.strip() for value in fields)
    return _row(caption, url, f"GCC_{block.split}_{index:09d}", source, block)


def _row(caption: str, url: str, identity: str, source: str, block: Ingest) -> SourceRow:
    check_url(url)
    request, placeholder = image_request(identity)
    turns = [("user", request), ("assistant", caption)]
    return make_source_row(
        source, block, modality="image", path=f"{identity}.jpg", turns=turns, placeholder=placeholder,
        source_id=identity, extra={"url": url}, location=url,
    )  # fmt: skip


def check_url(url: str) -> None:
    """Raises BadRow(bad_record) for text that is not a URL. The download decides whether it may be fetched."""
    try:
        parts = urlsplit(url)
        good = bool(parts.scheme and parts.hostname) and parts.port != 0  # raises ValueError for a port that is no number
    except ValueError:
        good = False
    if not good or len(url) > URL_CHARACTERS or not url.isprintable():
        raise BadRow("bad_record", f"not a URL: {url[:100].encode('utf-8', 'backslashreplace').decode()!r}")


def _open_media(block: Ingest, annotations: str) -> WebMedia:
    """The images at the rows' URLs, downloaded within the limits of the job's `ingest` block."""
    limits = DownloadLimits(block.download_timeout_s, block.download_retries, block.allow_private_addresses, block.honour_noai)
    return WebMedia(limits, block.download_threads, block.max_media_bytes)


FORMAT = Format(read, missing_share=1.0, open_media=_open_media)
