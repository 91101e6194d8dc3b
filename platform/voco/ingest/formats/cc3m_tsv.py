"""CC3M's TSV: a row is a caption, a tab and an image's URL, without a header. The job downloads the images.

    a red kite over the beach<TAB>http://example.org/kite.jpg

Every line is a row, even an empty one: the number of the line is the id in LLaVA's files, `GCC_train_000000017`.
A header would shift every id; it is rejected as a row.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from urllib.parse import urlsplit

from voco.ingest.captions import image_request
from voco.ingest.formats import Format
from voco.ingest.media.download import DownloadLimits
from voco.ingest.media.web import WebMedia
from voco.ingest.source_row import BadRow, Reject, SourceRow, make_source_row, parse_rows
from voco.job.config import Ingest
from voco.store import storage

LINE_BYTES = 1 << 20  # a longer line is rejected
URL_CHARACTERS = 8192  # a longer URL is rejected


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every line of the file, in order."""
    return parse_rows(uri, _lines(uri), lambda raw, index, source: parse(raw, index, source, block))


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
    check_url(url)
    identity = f"GCC_{block.split}_{index:09d}"
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
