"""Encoded images that no writer in this environment makes, and PNG and TIFF files assembled byte by byte."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

# 24 x 16 pixels of grey 10 x column, by imagecodecs 2026.3.6: libjpeg-turbo with 12 bits, ljpeg with 8, libjxl (in colours)
JPEG_12 = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggLDAsKDAkKCgr/wQAL"
    "DAAQABgBAREA/8QAFQABAQAAAAAAAAAAAAAAAAAADQ7/xAAYEAACAwAAAAAAAAAAAAAAAAAADEiFw//aAAgBAQAAPwAi/Um4zVGYoAKTcZqjMUAFJuM1RmS/+pNx"
    "mqMxQAUm4zVGYoAKTcZqjM//2Q=="
)
JPEG_LOSSLESS = base64.b64decode(
    "/9j/xAAWAAEBAQAAAAAAAAAAAAAAAAAABAj/wwALCAAQABgBABEA/9oACAEAAAYAAM/1VVVVVVVVVVVVVVVVVVVVVVAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAD/2Q=="
)
JPEG_XL = base64.b64decode(
    "/woDQSQIBAEAiAFLKDHdjPXBd5AXChIKCkoOQMS4ECMUORljJgQcOCGNhlcCgAGEAAIIAgYAEw8mTdHk/3/B/d/r8/1DOv96Ofr//xsnKQedCYzDuV3AMm38809OWvln"
    "4EgDalQDMDwAL2BYmQ=="
)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(width: int = 256, height: int = 4) -> npt.NDArray[np.uint16]:
    """(height, width) of 16 bits, from black at the left to white at the right."""
    return np.tile(np.linspace(0, 65535, width).round().astype(np.uint16), (height, 1))


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, depth: int, colour_type: int, row: bytes, *before: bytes, after: Sequence[bytes] = ()) -> bytes:
    """A PNG of one row of samples, with chunks before and after its pixels."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + b"".join((chunk(b"IHDR", header), *before, pixels, *after, chunk(b"IEND", b"")))


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with these chunks after its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def tiff(width: int, bits: int, pixels: bytes, photometric: int = 1, sample_format: int = 1, compression: int = 1) -> bytes:
    """A grey TIFF of one row, little-endian: pixels, then one directory of short tags."""
    tags = {256: width, 257: 1, 258: bits, 259: compression, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in sorted({**tags, 339: sample_format}.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", 10) + entries + b"\0\0\0\0"
