"""Any decoded image to RGB, where Pillow's own `convert("RGB")` would clip it or drop its alpha.

Grey of 16 bits is scaled to 8, because Pillow clips all above 255 to white. Transparent pixels become white, because what Pillow
leaves is the colour under them, mostly black: logos, diagrams and formulas in dark ink are drawn for white pages, where viewers
show them. Every other mode is converted by Pillow itself, so that ordinary images have the pixels that LLaVA sees.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from PIL import Image

from voco.image.fault import BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT, ImageFault

RGB_RULE = "alpha on white, grey of 16 bits scaled"  # part of every key of features and caches: change both together

GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
INTEGERS = "integers whose values do not say which of them is white"

WHITE_IS_ZERO, SIGNED = 0, 2  # values of PHOTOMETRIC and SAMPLE_FORMAT (TIFF 6.0, sections 8 and 19)


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image of the same size. Loads the pixels of an opened file: raises Pillow's errors for damaged ones.

    Raises ImageFault(unsupported_format) for pixels without a defined black and white (floats, signed integers, integers of
    32 bits beyond the range of 16), and for modes that Pillow cannot convert.
    """
    image.load()
    if image.mode == "F":
        raise ImageFault("unsupported_format", "pixels are floating-point numbers, whose range from black to white no file says")
    if image.mode == "L" and _tag(image, SAMPLE_FORMAT, 1) == SIGNED:
        raise ImageFault("unsupported_format", f"pixels are signed {INTEGERS}")
    if image.mode in GREY_16 or image.mode == "I":
        return _grey(image)
    try:
        return _on_white(image) if image.has_transparency_data else image.convert("RGB")
    except ValueError as error:  # the pixels are loaded, so this is about the mode alone
        raise ImageFault("unsupported_format", f"mode {image.mode}: {error}") from error


def _grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, 0 black and 2^bits - 1 white, rounded to 8 bits. A transparent value becomes white.

    Mode I has 32 bits, and is how programs without a mode for 16 store 16. It is read so if its values are such: some above 255.
    """
    values = image.convert("I")
    bounds: Any = values.getextrema()
    low, high = bounds
    if image.mode == "I" and not (low >= 0 and 255 < high < 1 << 16):
        raise ImageFault("unsupported_format", f"pixels of {low} to {high} are {INTEGERS}")
    bits = _tag(image, BITS_PER_SAMPLE, 16) if image.mode in GREY_16 else 16  # Pillow reads 12 bits as 0 to 4,095
    table = list(_scale(bits))
    if image.mode in GREY_16 and _tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO:  # which Pillow inverts up to 8 bits only
        table = [255 - grey for grey in table]
    transparent = image.info.get("transparency")
    if transparent is not None:
        table[transparent] = 255
    return values.point(table, "L").convert("RGB")


@lru_cache
def _scale(bits: int) -> tuple[int, ...]:
    """The grey of 0 to 255 for each value that 16 bits can have; those above the white of `bits` are white."""
    white = (1 << bits) - 1
    return tuple(min(255, (510 * value + white) // (2 * white)) for value in range(1 << 16))


def _on_white(image: Image.Image) -> Image.Image:
    """Alpha, a transparent colour, or a palette with either, composited on white. Opaque pixels stay as they are."""
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    alpha = rgba.getchannel("A")
    if image.format == "BMP" and alpha.getextrema() == (0, 0):  # writers that leave the fourth byte 0 mean an opaque image
        return rgba.convert("RGB")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, mask=alpha)
    return canvas


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """The first value of a TIFF's tag; `default` for one without it, and for other images."""
    value: Any = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)
