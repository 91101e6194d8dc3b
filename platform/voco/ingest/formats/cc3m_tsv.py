"""CC3M's TSV: one row is a caption, a tab and an image's URL; there is no header. The job downloads the images.

    a red kite over the beach<TAB>http://example.org/kite.jpg

Every line is a row, an empty one too: the number of the line is the id that LLaVA's files use, `GCC_train_000000017`.
So a header that was put in front would shift every id; it is rejected as a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from voco.ingest.formats.captions import image_request
from voco.ingest.source_row import BadRow, Reject, SourceRow, make_source_row, parse_rows
from voco.job.config import Ingest
from voco.store import storage

LINE = 1 << 20  # bytes; a longer line is no row of this format
URL = 8192  # characters


def read(uri: str, block: Ingest) -> Iterator[SourceRow | Reject]:
    """Every line of the file, in order."""
    return parse_rows(uri, _lines(uri), lambda raw, index, source: parse(raw, index, source, block))


def _lines(uri: str) -> Iterator[bytes]:
    """Every line without its end; of one that is too long, the beginning."""
    with storage.open_read(uri) as handle:
        first = True
        while line := handle.readline(LINE):
            end = line
            while not end.endswith(b"\n") and (more := handle.readline(LINE)):
                end = more
            yield line.removeprefix(b"\xef\xbb\xbf") if first else line
            first = False


def parse(raw: bytes, index: int, source: str, block: Ingest) -> SourceRow:
    """Line `index` as an item. Raises BadRow with the first thing that is wrong with it."""
    if len(raw) == LINE and not raw.endswith(b"\n"):
        raise BadRow("bad_record", f"a line of more than {LINE} bytes")
    fields = raw.rstrip(b"\r\n").decode("utf-8", "surrogateescape").split("\t")
    if len(fields) != 2:
        raise BadRow("bad_record", f"expected a caption and a URL with one tab between, got {len(fields)} fields")
    caption, url = (value.strip() for value in fields)
    check_url(url)
    identity = f"GCC_{block.split}_{index:09d}"
    request, where = image_request(identity)
    turns = [("user", request), ("assistant", caption)]
    return make_source_row(
        source, block, modality="image", path=f"{identity}.jpg", turns=turns, placeholder=where,
        source_id=identity, extra={"url": url}, place=url,
    )  # fmt: skip


def check_url(url: str) -> None:
    """Raises BadRow: bad_record for what is no URL; whether it may be fetched is said when it is."""
    try:
        parts = urlsplit(url)
        good = bool(parts.scheme and parts.hostname) and parts.port != 0  # a port that is no number raises
    except ValueError:
        good = False
    if not good or len(url) > URL or not url.isprintable():
        raise BadRow("bad_record", f"not a URL: {url[:100].encode('utf-8', 'backslashreplace').decode()!r}")
