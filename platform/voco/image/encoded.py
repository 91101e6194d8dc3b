"""An encoded image, opened and decoded in one way for ingest, features, caches, `voco ask` and the report."""

from __future__ import annotations

import io
import zlib

from PIL import AvifImagePlugin, Image

from voco.image.fault import PNG, ImageFault, image_faults, unread_variant
from voco.image.rgb import to_rgb

# The Pillow decoders that may read untrusted files. The one named JPEG opens MPO too.
DECODERS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")

# Pillow's name of each format to the name in `samples/`. MPO is a JPEG followed by further pictures.
FORMATS = {
    "JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff", "AVIF": "avif",
}  # fmt: skip

# Chunks of a PNG that say nothing about its pixels as we read them: text, and a colour profile
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
PNG_GREY, PNG_RGB = 0, 2  # colour types

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # of one image; callers decode images in parallel, on a thread for each CPU


def open_image(data: bytes) -> Image.Image:
    """The image in an encoded file, by its header; `load` or `to_rgb` decodes it. Only DECODERS are tried.

    Raises ImageFault: unsupported_format, corrupt_media, media_too_large.
    """
    with image_faults(data):
        image = Image.open(io.BytesIO(without_png_text(data)), formats=DECODERS)
        if data[12:16] == b"IHDR" and "transparency" in image.info:
            _scale_colour_key(image, data[24], data[25])
    if image.format in ("JPEG", "MPO") and (variant := unread_variant(data)):
        raise ImageFault("unsupported_format", variant)
    return image


def read_rgb(data: bytes) -> Image.Image:
    """The picture in an encoded file as RGB pixels (`to_rgb`). Raises ImageFault, as `open_image`."""
    with image_faults(data), open_image(data) as image:
        return to_rgb(image)


def without_png_text(data: bytes) -> bytes:
    """A PNG without its text and its colour profile; any other file as it is.

    Pillow inflates them when it opens a file, and rejects a good picture with more than 1 MiB of either in a chunk, or 64 MiB in
    all. We read none of it, so nothing is inflated and no limit is lifted. A chunk with a wrong checksum stays for Pillow to see.
    Source: PNG, section 5.3: length, type, data, CRC-32 of type and data.
    """
    if not data.startswith(PNG):
        return data
    view, parts, start, at = memoryview(data), [], 0, len(PNG)
    while at + 12 <= len(data):
        end, kind = at + 12 + int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if end > len(data) or kind == b"IEND":
            break
        if kind in PNG_TEXT and zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big"):
            parts.append(view[start:at])
            start = end
        at = end
    return b"".join([*parts, view[start:]]) if parts else data


def _scale_colour_key(image: Image.Image, depth: int, colour_type: int) -> None:
    """The transparent colour of a PNG in the range of its pixels as Pillow decodes them: of 0 to 255, where it leaves the key as
    in the file (PNG, section 11.3.1.1: in the file's own bit depth). Grey of 16 bits keeps both.
    """
    key = image.info["transparency"]
    if colour_type == PNG_GREY and depth in (2, 4):
        image.info["transparency"] = key * 255 // ((1 << depth) - 1)
    elif colour_type == PNG_RGB and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)
