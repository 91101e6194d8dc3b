"""Encoded files: which are read, and whether the rest is damaged, too large or of a kind that is not read."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from image.kinds import JPEG_12, JPEG_LOSSLESS, JPEG_XL, chunk, encode, png, tiff, with_chunks
from PIL import AvifImagePlugin, Image, PngImagePlugin

from voco.image.encoded import DECODERS, FORMATS, open_image, read_rgb, without_png_text
from voco.image.fault import ImageFault

MIB = 1 << 20


BMP_OF_A_JPEG = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 62, 0, 0, 54, 40, 1, 1, 1, 24, 4, 8, 0, 0, 0, 0) + bytes(8)


def photo(size: tuple[int, int] = (64, 40)) -> Image.Image:
    soft = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return soft.resize(size, Image.Resampling.BICUBIC)


def by_av(codec: str, pixel_format: str) -> bytes:
    """An image as libavcodec encodes it."""
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt, context.time_base = 64, 40, pixel_format, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.asarray(photo()), format="rgb24").reformat(format=pixel_format)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def fault(data: bytes) -> ImageFault:
    with pytest.raises(ImageFault) as caught:
        read_rgb(data)
    assert "\n" not in str(caught.value)
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_every_kind_is_read_and_has_a_name(kind: str) -> None:
    data = encode(photo(), kind)
    with open_image(data) as image:
        assert FORMATS[str(image.format)] == kind.lower()
    assert np.abs(np.asarray(read_rgb(data)).astype(int) - np.asarray(photo())).mean() < 12
    assert kind in DECODERS


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_avif(mode: str) -> None:
    image = photo().convert(mode)
    if mode == "RGBA":
        image.paste((0, 0, 0, 0), (0, 0, 32, 40))
    pixels = np.asarray(read_rgb(encode(image, "AVIF", quality=95))).astype(int)
    if mode == "RGBA":
        assert pixels[:, :28].min() > 245
    assert np.abs(pixels[:, 36:] - np.asarray(image.convert("RGB"))[:, 36:]).mean() < 4
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1


def test_lossless_jpeg_is_read() -> None:
    expected = np.tile(np.arange(24) * 10, (16, 1))
    assert (np.asarray(read_rgb(JPEG_LOSSLESS)) == expected[..., None]).all()


OTHERS = {
    kind: encode(photo(), kind) for kind in ("JPEG2000", "ICO", "TGA", "PPM", "PDF", "EPS", "SGI", "PCX", "DDS", "ICNS", "QOI")
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_that_pillow_writes_are_unsupported(kind: str) -> None:
    assert fault(OTHERS[kind]).reason == "unsupported_format"


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (JPEG_12, "JPEG of 12 bits"),
        (by_av("jpegls", "gray"), "JPEG of the kind JPEG-LS"),
        (by_av("jpegls", "rgb24"), "JPEG of the kind JPEG-LS"),
        (by_av("jpeg2000", "rgb24"), "JPEG 2000: begins with "),
        (OTHERS["JPEG2000"], "JPEG 2000: begins with "),
        (JPEG_XL, "JPEG XL: begins with "),
        (OTHERS["TGA"], "TGA: begins with "),
        (OTHERS["ICO"], "an icon: begins with "),
        (OTHERS["PDF"], "PDF: begins with "),
        (OTHERS["DDS"], "DDS: begins with "),
        (b"8BPS\0\1" + bytes(40), "Photoshop: begins with "),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "SVG: begins with "),
        (b"<!DOCTYPE html><html></html>", "a web page: begins with "),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIF or a video: begins with "),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40), "HEIF or a video: begins with "),
        (b"BMW and other makers of cars", "begins with b'BMW and othe'"),
        (b"no picture at all", "begins with b'no picture a'"),
        (tiff(2, 64, bytes(16), sample_format=3), "TIFF of bits (64,), sample format (3,), photometric interpretation 1"),
        (tiff(4, 24, bytes(12)), "TIFF of bits (24,), "),
        (tiff(2, 8, bytes(2), compression=34712), "TIFF of compression 34712"),
        (tiff(2, 8, encode(photo((2, 1)), "WEBP"), compression=50001), "TIFF of compression 50001"),
        (png(1, 8, 0, b"\0")[:8] + chunk(b"CgBI", bytes(4)) + png(1, 8, 0, b"\0")[8:-30] + bytes(18), "CgBI"),
        (BMP_OF_A_JPEG, "Unsupported BMP compression (4)"),
    ],
)  # fmt: skip
def test_what_pillow_merely_cannot_read_is_unsupported_and_named(data: bytes, detail: str) -> None:
    refused = fault(data)
    assert refused.reason == "unsupported_format"
    assert detail in refused.detail


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_what_is_cut_is_damaged(kind: str, share: float) -> None:
    data = encode(photo(), kind)
    assert fault(data[: max(16, int(len(data) * share))]).reason == "corrupt_media"


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd", "lzma"])
def test_a_cut_tiff_of_a_compression_that_is_read_is_damaged(compression: str) -> None:
    data = encode(photo(), "TIFF", compression=compression)
    assert read_rgb(data).size == (64, 40)
    assert fault(data[: len(data) // 2]).reason == "corrupt_media"


def test_a_cut_big_tiff_is_damaged() -> None:
    data = encode(photo(), "TIFF", big_tiff=True)
    assert (data[:4], read_rgb(data).size) == (b"II+\0", (64, 40))
    assert fault(data[:60]).reason == "corrupt_media"


def test_a_bomb_is_too_large() -> None:
    data = png(60_000, 8, 0, b"")
    data = data[:20] + (60_000).to_bytes(4, "big") + data[24:]
    data = data[:29] + zlib.crc32(data[12:29]).to_bytes(4, "big") + data[33:]
    assert fault(data).reason == "media_too_large"


def text(kind: bytes, size: int) -> bytes:
    """A chunk of `size` bytes of text, or of a profile."""
    body = bytes(size)
    return {
        b"tEXt": lambda: chunk(kind, b"Comment\0" + b"x" * size),
        b"zTXt": lambda: chunk(kind, b"Comment\0\0" + zlib.compress(body)),
        b"iTXt": lambda: chunk(kind, b"Comment\0\1\0\0\0" + zlib.compress(body)),
        b"iCCP": lambda: chunk(kind, b"profile\0\0" + zlib.compress(body)),
    }[kind]()


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_with_much_text_is_read(kind: bytes) -> None:
    plain = encode(photo(), "PNG")
    data = with_chunks(plain, text(kind, 2 * MIB))
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(data))
    assert read_rgb(data).tobytes() == photo().tobytes()
    assert without_png_text(data) == plain
    behind = plain[:-12] + text(kind, 2 * MIB) + plain[-12:]  # which Pillow reads with the pixels
    assert read_rgb(behind).tobytes() == photo().tobytes()


def test_a_png_with_more_text_than_pillow_takes_in_all() -> None:
    data = with_chunks(encode(photo(), "PNG"), *[text(b"tEXt", MIB)] * 65)
    with pytest.raises(ValueError, match="Too much memory"):
        Image.open(io.BytesIO(data))
    assert read_rgb(data).tobytes() == photo().tobytes()


def test_text_is_never_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb of 1 GiB in a chunk of 1 MB costs nothing, and Pillow's own limits stay."""
    inflated: list[int] = []
    original = PngImagePlugin._safe_zlib_decompress

    def spy(data: bytes) -> bytes:
        inflated.append(len(data))
        return original(data)

    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", spy)
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(MIB)) for _ in range(1024)) + packer.flush()
    data = with_chunks(encode(photo(), "PNG"), chunk(b"iCCP", b"p\0\0" + bomb), chunk(b"zTXt", b"k\0\0" + bomb))
    assert read_rgb(data).tobytes() == photo().tobytes()
    assert not inflated
    assert PngImagePlugin.MAX_TEXT_CHUNK == MIB


def test_damaged_text_and_other_chunks_stay() -> None:
    plain = encode(photo(), "PNG")
    damaged = bytearray(text(b"tEXt", 20))
    damaged[12] ^= 1
    data = with_chunks(plain, bytes(damaged))
    assert without_png_text(data) == data
    assert fault(data).reason == "corrupt_media"
    gamma = with_chunks(plain, chunk(b"gAMA", (45455).to_bytes(4, "big")), chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0"))
    for unchanged in (plain, gamma, plain[:50], plain[:7], encode(photo(), "JPEG"), b""):
        assert without_png_text(unchanged) is unchanged
