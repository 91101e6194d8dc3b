"""What is wrong with a file that is no picture: damaged, too large, or of a kind that is not read.

Pillow says "cannot identify image file" of a damaged PNG as of a PDF and of a JPEG with 12 bits. The difference is in the file.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import AvifImagePlugin, Image, TiffImagePlugin

from voco.errors import one_line

# Errors of Pillow's decoders on damaged files: they parse with struct, zlib and plain indexing, and libavif's are RuntimeError.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")  # the second pair is wrong but written, the third BigTIFF
GIF = (b"GIF87a", b"GIF89a")
AVIF_BRANDS, GENERAL_BRANDS = (b"avif", b"avis"), (b"mif1", b"msf1")  # ISO 23000-22 and 23008-12: AVIF's own, and any codec's

# Kinds that people take for pictures and that are not read, by the bytes at an offset: the name makes the reject clear
OTHER_KINDS = (
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"), (0, b"\xff\x4f\xff\x51", "JPEG 2000"), (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"), (0, b"II\xbc\x01", "JPEG XR"), (4, b"ftyp", "HEIF or a video"), (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"), (0, b"%!PS", "PostScript"), (0, b"\0\0\1\0", "an icon"), (0, b"icns", "an icon"), (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"), (0, b"\x76\x2f\x31\x01", "OpenEXR"), (0, b"#?RADIANCE", "Radiance HDR"), (0, b"gimp xcf", "GIMP"),
    (0, b"<svg", "SVG"), (0, b"<?xml", "XML, as SVG is"), (0, b"<!DOCTYPE", "a web page"), (0, b"<html", "a web page"),
)  # fmt: skip
TRUEVISION = b"TRUEVISION-XFILE.\0"  # the end of a TGA, which has no other mark

# Frame headers of a JPEG (ITU-T T.81, table B.1): those that libjpeg-turbo decodes, lossless (C3) too, and the others
JPEG_READ = {0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA}
JPEG_OTHERS = {
    0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xCB: "lossless arithmetic", 0xCD: "hierarchical",
    0xCE: "hierarchical", 0xCF: "hierarchical", 0xDE: "hierarchical", 0xF7: "JPEG-LS",
}  # fmt: skip

COMPRESSION, BITS_PER_SAMPLE, SAMPLE_FORMAT, PHOTOMETRIC = 259, 258, 339, 262  # tags (TIFF 6.0)
TIFF_UNREAD = {50001}  # WebP: Pillow has a name for it, but its wheels' libtiff has no codec
TIFF_MODE = ("unknown pixel mode", "Invalid value for samples per pixel")  # what Pillow says of good files that it cannot map


class ImageFault(ValueError):
    """Why bytes are not a picture: a reason of `store/schemas.py` REASONS (corrupt_media, unsupported_format, media_too_large)
    and a detail for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@contextmanager
def image_faults(data: bytes) -> Iterator[None]:
    """Raises ImageFault in place of Pillow's errors about the file `data`."""
    try:
        yield
    except ImageFault:
        raise
    except Image.DecompressionBombError as error:
        raise ImageFault("media_too_large", str(error)) from error
    except DECODER_ERRORS as error:
        raise _fault(data, error) from error


def _fault(data: bytes, error: Exception) -> ImageFault:
    """Of a file that cannot be decoded: `corrupt_media` if it is of a kind that is read, and nothing else explains the error."""
    if data and not _is_read(data):
        name = _other_kind(data)
        return ImageFault("unsupported_format", f"{name + ': ' if name else ''}begins with {data[:12]!r}")
    variant = unread_variant(data) or (str(error) if str(error).startswith("Unsupported BMP") else "")
    return ImageFault("unsupported_format", variant) if variant else ImageFault("corrupt_media", one_line(error))


def _is_read(data: bytes) -> bool:
    """True for the first bytes of a kind of file that is read, damaged or not."""
    if data[:2] == b"BM":  # two letters prove nothing: a header's size follows, at most 124 in all versions of BMP
        return len(data) < 18 or int.from_bytes(data[14:18], "little") <= 124
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return webp or _is_avif(data) or data.startswith((JPEG, PNG, *GIF, *TIFF))


def _is_avif(data: bytes) -> bool:
    """The box ftyp: its size, a major brand, a version and compatible brands. HEIF of other codecs has the general brands too."""
    if data[4:8] != b"ftyp":
        return False
    end = int.from_bytes(data[:4], "big")
    compatible = {data[at : at + 4] for at in range(16, min(end, 256), 4)}
    return data[8:12] in AVIF_BRANDS or (data[8:12] in GENERAL_BRANDS and not compatible.isdisjoint(AVIF_BRANDS))


def _other_kind(data: bytes) -> str:
    """The name of a kind that is not read; empty if it is none of those known."""
    if data.endswith(TRUEVISION):
        return "TGA"
    return next((name for at, magic, name in OTHER_KINDS if data.startswith(magic, at)), "")


def unread_variant(data: bytes) -> str:
    """What makes a file of a kind that is read in general unreadable, although it is not damaged. Empty if nothing does."""
    if data.startswith(JPEG):
        return _jpeg_variant(data)
    if data.startswith(PNG):
        return "PNG in Apple's own form for iOS (CgBI)" if data[12:16] == b"CgBI" else ""
    if _is_avif(data) and not AvifImagePlugin.SUPPORTED:
        return "AVIF, which this build of Pillow does not decode"
    return _tiff_variant(data) if data.startswith(TIFF) else ""


def _jpeg_variant(data: bytes) -> str:
    """By the frame header: its marker, bits and components (T.81, B.2.2). Empty if no header is reached."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in JPEG_OTHERS:
            return f"JPEG of the kind {JPEG_OTHERS[marker]}"
        if marker in JPEG_READ:
            bits, components = data[at + 4], data[at + 9]
            if bits != 8 and 2 <= bits <= 16:
                return f"JPEG of {bits} bits"
            return f"JPEG of {components} components" if components not in (1, 3, 4) else ""
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")  # any number of FF may fill
    return ""


def _tiff_variant(data: bytes) -> str:
    """By the first directory of tags, if it is complete: a compression without a decoder, or pixels without a mode in Pillow."""
    file, big_tiff = io.BytesIO(data), 43 in data[2:4]
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big_tiff else 8])
        at = directory.next
        file.seek(at)
        directory.load(file)
        count = int.from_bytes(data[at : at + (8 if big_tiff else 2)], "little" if data[:2] == b"II" else "big")
        if len(directory) < count:  # Pillow leaves out tags that are cut off
            return ""
        compression = directory.get(COMPRESSION, 1)
        if compression not in TiffImagePlugin.COMPRESSION_INFO or compression in TIFF_UNREAD:
            return f"TIFF of compression {compression}"
        TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    except SyntaxError as error:  # `Image.open` hides its message
        if str(error) not in TIFF_MODE:
            return ""
        facts = ((BITS_PER_SAMPLE, "bits"), (SAMPLE_FORMAT, "sample format"), (PHOTOMETRIC, "photometric interpretation"))
        return ("TIFF of " + ", ".join(f"{name} {directory.get(tag, 1)}" for tag, name in facts))[:200]
    except DECODER_ERRORS:
        return ""
    return ""
