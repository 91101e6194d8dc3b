"""One image file: recognise its format by content and check that it is complete."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from PIL import Image

from voco.errors import one_line
from voco.ingest.media.decoder import DECODER_ERRORS, DECODERS, Decoder
from voco.ingest.media.source import MediaLimits, MediaSource, check_dimensions
from voco.ingest.source_row import BadRow

# Pillow's name of each format to the name in `samples/`. MPO is a JPEG followed by further pictures.
FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff"}

# First bytes of these formats. An unreadable file that starts like this is damaged, any other one is unsupported.
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")


def read_image(root: MediaSource, path: str, limits: MediaLimits, decoder: Decoder) -> dict[str, Any]:
    """One image as a `store/schemas.py` MEDIUM. Raises BadRow when it is missing, unsafe or damaged."""
    data = root.read(path, limits.max_media_bytes)
    try:
        kind, width, height = check_image(data, limits, decoder)
    except BadRow as bad:
        raise BadRow(bad.reason, f"{path}: {bad.detail}") from bad
    digest = hashlib.sha256(data).hexdigest()
    no_video = {"duration_s": None, "fps": None, "num_frames": None}
    return {"bytes": data, "path": path, "format": kind, "sha256": digest, "width": width, "height": height, **no_video}


def check_image(data: bytes, limits: MediaLimits, decoder: Decoder) -> tuple[str, int, int]:
    """Format by content, width and height in pixels as stored (EXIF orientation ignored).

    With `header`, no pixels are decoded if the file shows cheaply that it is complete: a JPEG with an end marker after its
    last scan, a PNG whose chunks have correct checksums. Any other file is decoded, as with `full`.
    Raises BadRow: unsupported_format, corrupt_media, media_too_large, decode_timeout.
    """
    try:
        with Image.open(io.BytesIO(data), formats=DECODERS) as image:
            kind, (width, height) = FORMATS[str(image.format)], image.size
            check_dimensions(width, height, limits)
            if limits.check == "header" and kind == "png":
                image.verify()
    except Image.DecompressionBombError as error:
        raise BadRow("media_too_large", str(error)) from error
    except DECODER_ERRORS as error:
        webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
        if data and not webp and not data.startswith(MAGIC):
            raise BadRow("unsupported_format", f"begins with {data[:12]!r}") from error
        raise BadRow("corrupt_media", one_line(error)) from error
    if limits.check == "full" or not (kind == "png" or (kind == "jpeg" and _jpeg_ends(data))):
        decoder.image(data)
    return kind, width, height


def _jpeg_ends(data: bytes) -> bool:
    """True when an end marker follows the last start of scan. Neither pair of bytes can occur inside a scan."""
    end = data.rfind(b"\xff\xd9")  # near the end of a complete file, so the search is short
    return end >= 0 and data.find(b"\xff\xda", end) < 0
