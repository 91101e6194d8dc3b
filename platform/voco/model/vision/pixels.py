"""An image to the square of pixels that a tower takes: bit for bit as LLaVA does it, or several times faster.

Legend: S side of the square in pixels. `llava_pixels` and `fast_pixels` pad the image to a square, resize it with an
antialiased bicubic filter and ignore EXIF orientation, as LLaVA does. They differ in decoder, in rounding, and at the border.
`image` is encoded bytes, which raise ImageFault where they are no picture, or an image of Pillow's, which raises its errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from voco.image.encoded import read_rgb
from voco.image.rgb import to_rgb
from voco.job.config import PILLOW_MAX_PIXELS
from voco.sequence.anyres import Anyres, Size, fit_inside

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

JPEG = b"\xff\xd8\xff"


def llava_pixels(image: Image.Image | bytes, size: int, fill: Colour) -> Tensor:
    """(S, S, 3) uint8 by Pillow alone: LLaVA's `expand2square`, then its processor's resize."""
    image = _rgb(image)
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new("RGB", (side, side), fill)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def anyres_pixels(image: Image.Image | bytes, anyres: Anyres) -> tuple[Tensor, Size]:
    """(T, S, S, 3) uint8 and the image's height and width, as LLaVA-1.6 cuts it: the complete image, squeezed into a square, then
    the squares of its resolution in raster order, the image in the middle and black around it.
    """
    image = _rgb(image)
    size = (image.height, image.width)
    target = anyres.resolution(size)
    height, width = fit_inside(size, target)
    sheet = Image.new("RGB", (target[1], target[0]))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    sheet.paste(resized, ((target[1] - width) // 2, (target[0] - height) // 2))
    side = anyres.tile
    grid = np.array(sheet).reshape(target[0] // side, side, target[1] // side, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return torch.cat((squeezed_pixels(image, side)[None], torch.from_numpy(grid))), size


def squeezed_pixels(image: Image.Image | bytes, side: int) -> Tensor:
    """(S, S, 3) uint8: an image squeezed into a square, for SigLIP, and for LLaVA-1.6's complete images and video frames."""
    return torch.from_numpy(np.array(_rgb(image).resize((side, side), Image.Resampling.BICUBIC)))


def fast_pixels(image: Image.Image | bytes, size: int, fill: Colour) -> Tensor:
    """(S, S, 3) uint8: a JPEG by libjpeg-turbo, any other image by Pillow; torch resizes the picture before it is padded.

    A JPEG of at least twice the size is decoded at a fraction of it. Raises ImportError without the extra `fast`.
    """
    pixels = _jpeg(image, size) if isinstance(image, bytes) and image.startswith(JPEG) else None
    if pixels is None:  # not a JPEG, or one that libjpeg-turbo cannot decode: CMYK, or bytes between its parts
        pixels = np.array(_rgb(image))
    height, width = _scaled_size(pixels.shape[0], pixels.shape[1], size)
    picture = torch.from_numpy(pixels)
    if (height, width) != pixels.shape[:2]:
        picture_chw = picture.permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(
            picture_chw, (height, width), mode="bicubic", antialias=True, align_corners=False
        )
        picture = resized[0].permute(1, 2, 0)
    if height == width:
        return picture.contiguous()
    square = torch.tensor(fill, dtype=torch.uint8).repeat(size, size, 1)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def _scaled_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of a picture whose longer side becomes `size`."""
    side = max(height, width)
    return max(1, round(height * size / side)), max(1, round(width * size / side))


def _rgb(image: Image.Image | bytes) -> Image.Image:
    return read_rgb(image) if isinstance(image, bytes) else to_rgb(image)


def _jpeg(data: bytes, size: int) -> Pixels | None:
    """(H, W, 3) of a JPEG, at least as large as inside the square; None for a JPEG that Pillow must read."""
    try:
        import simplejpeg
    except ImportError as error:
        raise ImportError("tower.decoder: fast needs the package simplejpeg: pip install 'voco[fast]'") from error
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray", "RGB") or height * width > PILLOW_MAX_PIXELS:  # Pillow refuses a decompression bomb
            return None
        smallest: dict[str, Any] = dict(zip(("min_height", "min_width"), _scaled_size(height, width, size), strict=True))
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_factor=2, **smallest)
    except ValueError:
        return None
    return pixels


DECODERS = {"pil": llava_pixels, "fast": fast_pixels}
