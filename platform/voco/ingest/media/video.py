"""One video file: read it, recognise its container by content, check that it is complete, measure it with the decoder."""

from __future__ import annotations

import hashlib
from typing import Any

from voco.ingest.media.decoder import Decoder
from voco.ingest.media.source import MediaLimits, MediaSource, check_dimensions
from voco.ingest.source_row import BadRow
from voco.video.extensions import VIDEO_EXTENSIONS

STILLS = {b"heic", b"heix", b"mif1", b"avif"}  # brands of images in the same container as mp4
VITAL = {b"moov", b"moof", b"mdat"}  # boxes of the video itself; any other box may be cut off at the end

EBML, SEGMENT, DOCTYPE = 0x1A45DFA3, 0x18538067, 0x4282


def read_video(root: MediaSource, path: str, limits: MediaLimits, decoder: Decoder) -> dict[str, Any]:
    """One video as a `store/schemas.py` MEDIUM; its `path` is the name of the file that was read.

    `limits.check` header: the container is complete and the first frame decodes. full: the middle and the last frame too.
    Raises BadRow: those of `root.read`, unsupported_format, corrupt_media, media_too_large (`check_dimensions`),
    decode_timeout.
    """
    return video_medium(*find_video(root, path, limits.max_media_bytes), limits, decoder)


def video_medium(name: str, data: bytes, limits: MediaLimits, decoder: Decoder) -> dict[str, Any]:
    """A video file's bytes as a MEDIUM. Raises BadRow: as `read_video`, without those of `root.read`."""
    try:
        kind = check_container(data)
        measures = decoder.video(data, limits.check == "full")
        check_dimensions(measures["width"], measures["height"], limits)
    except BadRow as bad:
        raise BadRow(bad.reason, f"{name}: {bad.detail}") from bad
    return {"bytes": data, "path": name, "format": kind, "sha256": hashlib.sha256(data).hexdigest(), **measures}


def find_video(root: MediaSource, path: str, limit: int) -> tuple[str, bytes]:
    """The name and bytes of the video at a path, which may lack its extension. Raises what `root.read` raises."""
    if path.lower().endswith((*VIDEO_EXTENSIONS, ".gif")):
        return path, root.read(path, limit)
    folder, _, name = path.rpartition("/")
    prefixed = f"{folder}/v_{name}" if folder else f"v_{name}"  # ActivityNet's file names
    for stem in (path,) if name.startswith("v_") else (path, prefixed):
        for extension in VIDEO_EXTENSIONS:
            try:
                return stem + extension, root.read(stem + extension, limit)
            except BadRow as bad:
                if bad.reason != "missing_media":
                    raise
    raise BadRow("missing_media", f"{path}: no such file with {', '.join(VIDEO_EXTENSIONS)}")


def check_container(data: bytes) -> str:
    """mp4, mov, mkv, webm, avi or gif, by content. Decoders often accept a truncated file; the container knows its own length.

    Raises BadRow: unsupported_format, corrupt_media (empty or truncated).
    """
    if not data:
        raise BadRow("corrupt_media", "an empty file")
    if data[4:8] == b"ftyp":
        if data[8:12] in STILLS:
            raise BadRow("unsupported_format", f"an image of brand {data[8:12]!r}")
        _check_boxes(data)
        return "mov" if data[8:12] == b"qt  " else "mp4"
    if data[:4] == EBML.to_bytes(4, "big"):
        return _check_ebml(data)
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        _check_riff(data)
        return "avi"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        if not data.rstrip(b"\0").endswith(b";"):
            raise BadRow("corrupt_media", "truncated: no trailer at its end")
        return "gif"
    raise BadRow("unsupported_format", f"begins with {data[:12]!r}")


def _check_boxes(data: bytes) -> None:
    """ISO 14496-12 section 4.2: 32-bit size and type; 1 means that a 64-bit size follows, 0 that the box ends the file."""
    at = 0
    while at + 8 <= len(data):
        size, kind, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if size == 0:
            return
        if size < head:
            break  # not a box: other bytes after the last one
        if at + size > len(data) and kind in VITAL:
            raise BadRow("corrupt_media", f"truncated: box {kind.decode()} ends at byte {at + size} of {len(data)}")
        at += size


def _check_riff(data: bytes) -> None:
    """AVI: a RIFF list with the streams in its list `movi`; above 1 GB further lists of type AVIX follow (OpenDML 1.02)."""
    at, kind = 0, b"AVI "
    while data[at : at + 4] == b"RIFF" and data[at + 8 : at + 12] == kind:
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if end > len(data) or not _has_movi(data, at + 12, end):
            raise BadRow("corrupt_media", f"truncated or never finished: list {kind.decode()} ends at byte {end} of {len(data)}")
        at, kind = end + end % 2, b"AVIX"


def _has_movi(data: bytes, at: int, end: int) -> bool:
    """True when the list `movi` is complete among the chunks from `at` to `end`: type, size, content padded to an even byte."""
    while at + 12 <= end:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"LIST" and data[at + 8 : at + 12] == b"movi":
            return at + 8 + size <= end
        at += 8 + size + size % 2
    return False


def _check_ebml(data: bytes) -> str:
    """RFC 8794: an EBML header with the document's type, then (RFC 9559) the segment, whose size may be unknown."""
    try:
        _, size, at = _element(data, 0)
        end = at + (size or 0)
        doctype = b""
        while at < end:
            kind, size, at = _element(data, at)
            if kind == DOCTYPE:
                doctype = data[at : at + (size or 0)].rstrip(b"\0")
            at += size or 0
        kind, size, at = _element(data, end)
    except IndexError as error:
        raise BadRow("corrupt_media", "truncated in the EBML header") from error
    if doctype not in (b"webm", b"matroska"):
        raise BadRow("unsupported_format", f"EBML of type {doctype[:20]!r}")
    if kind == SEGMENT and size is not None and at + size > len(data):
        raise BadRow("corrupt_media", f"truncated: the segment ends at byte {at + size} of {len(data)}")
    return "webm" if doctype == b"webm" else "mkv"


def _element(data: bytes, at: int) -> tuple[int, int | None, int]:
    """Id, size (None: unknown) and offset of the content of the EBML element at `at`. Raises IndexError at the end."""
    kind, _, at = _variable(data, at)
    value, width, at = _variable(data, at)
    size = value & ((1 << 7 * width) - 1)
    return kind, None if size == (1 << 7 * width) - 1 else size, at


def _variable(data: bytes, at: int) -> tuple[int, int, int]:
    """An integer whose leading zero bits give its width in bytes: value with the marker bit, width, offset of the next byte."""
    width = 9 - data[at].bit_length()
    if width > 8 or at + width > len(data):
        raise IndexError(at)
    return int.from_bytes(data[at : at + width], "big"), width, at + width
