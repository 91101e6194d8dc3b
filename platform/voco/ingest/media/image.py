"""One image file: recognise its format by content and check that it is complete."""

from __future__ import annotations

import hashlib
from typing import Any

from voco.image.encoded import FORMATS, open_image
from voco.image.fault import ImageFault, image_faults
from voco.ingest.media.decoder import Decoder
from voco.ingest.media.source import MediaLimits, MediaSource, check_dimensions
from voco.ingest.source_row import BadRow


def read_image(root: MediaSource, path: str, limits: MediaLimits, decoder: Decoder) -> dict[str, Any]:
    """One image as a `store/schemas.py` MEDIUM. Raises BadRow when it is missing, unsafe or damaged."""
    return image_medium(path, root.read(path, limits.max_media_bytes), limits, decoder)


def image_medium(path: str, data: bytes, limits: MediaLimits, decoder: Decoder) -> dict[str, Any]:
    """An image file's bytes as a MEDIUM. Raises BadRow when they are damaged."""
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
    last scan, a PNG whose chunks have correct checksums. Any other file is decoded to RGB, as with `full`.
    Raises BadRow: unsupported_format, corrupt_media, media_too_large, decode_timeout.
    """
    try:
        with image_faults(data), open_image(data) as image:
            kind, (width, height) = FORMATS[str(image.format)], image.size
            check_dimensions(width, height, limits)
            if limits.check == "header" and kind == "png":
                image.verify()
    except ImageFault as fault:
        raise BadRow(fault.reason, fault.detail) from fault
    if limits.check == "full" or not (kind == "png" or (kind == "jpeg" and _jpeg_ends(data))):
        decoder.image(data)
    return kind, width, height


def _jpeg_ends(data: bytes) -> bool:
    """True when an end marker follows the last start of scan. Neither pair of bytes can occur inside a scan."""
    end = data.rfind(b"\xff\xd9")  # near the end of a complete file, so the search is short
    return end >= 0 and data.find(b"\xff\xda", end) < 0
