"""The pixels of every mode that a file can have, as RGB: golden values, and modes that are refused instead of guessed."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from image.kinds import chunk, encode, png, ramp, tiff
from PIL import Image

from voco.image.encoded import read_rgb
from voco.image.fault import ImageFault
from voco.image.rgb import to_rgb

WHITE = (255, 255, 255)


def row(data: bytes) -> list[tuple[int, ...]]:
    """The pixels of an image's first row."""
    image = read_rgb(data)
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image)[0].tolist()]


def grey(data: bytes) -> list[int]:
    pixels = row(data)
    assert all(len(set(pixel)) == 1 for pixel in pixels)
    return [pixel[0] for pixel in pixels]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_sixteen_bits_is_scaled(kind: str) -> None:
    """A ramp from black to white stays one; Pillow's own conversion makes all but 256 of its 65,536 values white."""
    values = np.arange(65536, dtype=np.uint16)[None]
    data = encode(Image.fromarray(values), kind)
    assert grey(data) == [int(np.floor(value / 257 + 0.5)) for value in range(65536)]
    picture = np.asarray(read_rgb(encode(Image.fromarray(ramp()), kind)))
    assert picture.mean() == 127.5
    assert np.quantile(picture, (0, 0.25, 0.5, 0.75, 1)).tolist() == [0, 63.75, 127.5, 191.25, 255]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_every_order_of_bytes(mode: str) -> None:
    image = Image.new(mode, (3, 1))
    for x, value in enumerate((0, 32768, 65535)):
        image.putpixel((x, 0), value)
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 128, 255]


def test_tiff_of_twelve_bits_and_of_white_zero() -> None:
    assert grey(tiff(2, 12, bytes([0xFF, 0xF8, 0x00]))) == [255, 128]
    assert grey(tiff(3, 16, struct.pack("<3H", 0, 257, 65535))) == [0, 1, 255]
    assert grey(tiff(3, 16, struct.pack("<3H", 0, 257, 65535), photometric=0)) == [255, 254, 0]


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (encode(Image.fromarray(np.linspace(0, 1, 8, dtype=np.float32)[None]), "TIFF"), "floating-point"),
        (tiff(2, 32, struct.pack("<2f", 0.5, 1.0), sample_format=3), "floating-point"),
        (tiff(2, 32, struct.pack("<2I", 0, 2**32 - 1)), "integers"),
        (tiff(2, 32, struct.pack("<2i", 0, 70_000), sample_format=2), "0 to 70000"),
        (tiff(2, 32, struct.pack("<2i", 0, 255), sample_format=2), "0 to 255"),
        (tiff(2, 16, struct.pack("<2h", -5, 3000), sample_format=2), "-5 to 3000"),
        (tiff(2, 8, bytes([255, 1]), sample_format=2), "signed"),
    ],
    ids=["float", "float by hand", "unsigned 32", "signed 32", "dark", "signed 16", "signed 8"],
)
def test_values_without_a_white_are_refused(data: bytes, detail: str) -> None:
    with pytest.raises(ImageFault, match=detail) as caught:
        read_rgb(data)
    assert caught.value.reason == "unsupported_format"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_black_is_white(mode: str, kind: str) -> None:
    ink = {"RGBA": (200, 30, 10, 255), "LA": (40, 255)}[mode]
    image = Image.new(mode, (8, 8), (0,) * len(ink))
    image.paste(ink, (4, 0, 8, 8))
    pixels = np.asarray(read_rgb(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == (ink[:3] if mode == "RGBA" else ink[0])).all()
    assert (np.asarray(image.convert("RGB"))[:, :4] == 0).all(), "or Pillow would do"


def test_half_transparent_is_mixed_with_white() -> None:
    draw = np.random.default_rng(0)
    values = draw.integers(0, 256, (32, 32, 4), dtype=np.uint8)
    alpha = values[..., 3:].astype(np.float64) / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(read_rgb(encode(Image.fromarray(values), "PNG"))) - expected).max() <= 0.5
    values[..., 3] = 255
    assert (np.asarray(read_rgb(encode(Image.fromarray(values), "PNG"))) == values[..., :3]).all()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(8, 1, 0, bytes([0b01010101]), chunk(b"tRNS", b"\0\0")), [WHITE] * 8),
        (png(4, 2, 0, bytes([0b00011011]), chunk(b"tRNS", b"\0\1")), [(0,) * 3, WHITE, (170,) * 3, WHITE]),
        (png(2, 4, 0, bytes([0x5A]), chunk(b"tRNS", b"\0\5")), [WHITE, (170,) * 3]),
        (png(2, 8, 0, bytes([5, 9]), chunk(b"tRNS", b"\0\5")), [WHITE, (9,) * 3]),
        (png(2, 16, 0, struct.pack(">2H", 300, 2570), chunk(b"tRNS", struct.pack(">H", 300))), [WHITE, (10,) * 3]),
        (png(2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))), [WHITE, (4, 5, 6)]),
        (
            png(2, 16, 2, struct.pack(">6H", 300, 400, 9000, 65535, 0, 0), chunk(b"tRNS", struct.pack(">3H", 300, 400, 9000))),
            [WHITE, (255, 0, 0)],
        ),
        (png(2, 8, 3, bytes([0, 1]), chunk(b"PLTE", bytes(6)), chunk(b"tRNS", b"\0")), [WHITE, (0,) * 3]),
        (png(2, 8, 3, bytes([0, 1]), chunk(b"PLTE", bytes(6)), chunk(b"tRNS", bytes([51, 102]))), [(204,) * 3, (153,) * 3]),
        (png(2, 16, 4, struct.pack(">4H", 2570, 65535, 0, 0)), [(10,) * 3, WHITE]),
    ],
    ids=["1", "L2", "L4", "L8", "L16", "RGB8", "RGB16", "P index", "P alphas", "LA16"],
)
def test_a_transparent_colour_in_every_depth_of_png(data: bytes, expected: list[tuple[int, ...]]) -> None:
    assert row(data) == expected


def test_a_transparent_gif_is_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 250, 0, 0])
    image.putpixel((1, 0), 1)
    assert row(encode(image, "GIF", transparency=0)) == [WHITE, (250, 0, 0), WHITE, WHITE]
    assert row(encode(image, "GIF"))[0] == (0, 0, 0)


def test_a_bmp_whose_alpha_is_all_zero_is_opaque() -> None:
    """Its fourth byte is often left 0: a version 4 header, 32 bits with masks for red, green, blue and alpha."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0) + masks + bytes(108 - 56)
    for alpha, second in ((0, (4, 5, 6)), (255, (4, 5, 6))):
        pixels = bytes([3, 2, 1, 0, 6, 5, 4, alpha])
        data = b"BM" + struct.pack("<IHHI", 14 + 108 + 8, 0, 0, 14 + 108) + header + pixels
        assert row(data) == [(1, 2, 3) if alpha == 0 else WHITE, second]


@pytest.mark.parametrize(
    ("mode", "kind"), [("LAB", "TIFF"), ("YCbCr", "TIFF"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("PA", "TIFF")]
)
def test_other_modes_are_pillows(mode: str, kind: str) -> None:
    """Each shows the colour that was stored, within the rounding of its space."""
    colour = (180, 90, 40)
    source = Image.new("RGB", (16, 16), colour)
    image = source.convert("P").convert("PA") if mode == "PA" else _lab(source) if mode == "LAB" else source.convert(mode)
    pixel = np.asarray(read_rgb(encode(image, kind))).reshape(-1, 3).mean(0)
    assert np.abs(pixel - colour).max() <= (26 if mode == "PA" else 3)


def _lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    assert converted is not None
    return converted


def test_images_in_memory_have_the_same_rule() -> None:
    premultiplied = Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert("RGBa")
    for image in (premultiplied, Image.new("LA", (2, 2), (0, 0)).convert("La"), Image.new("PA", (2, 2))):
        assert set(to_rgb(image).getdata()) == {WHITE}
    assert to_rgb(Image.new("HSV", (2, 2), (0, 255, 255))).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ImageFault, match="floating-point"):
        to_rgb(Image.new("F", (2, 2)))
