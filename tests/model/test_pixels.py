"""The pixels of a tower: Pillow's are LLaVA's bit for bit, the fast ones are close, and their hashes differ."""

from __future__ import annotations

import io

import numpy as np
import pytest
import shapes
import torch
from image.kinds import ramp
from PIL import Image
from torch import nn

from voco.image.fault import ImageFault
from voco.image.rgb import RGB_RULE
from voco.model.vision.pixels import fast_pixels, llava_pixels
from voco.model.vision.tower import CLIP, VisionTower

GREY = (122, 116, 104)


def tower(**changes) -> VisionTower:
    return VisionTower(shapes.tower("clip", layer=-2, **changes), nn.Conv2d(3, 1, 3), *CLIP)


def photo(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Soft shapes, as photographs have."""
    draw = np.random.default_rng(seed)
    soft = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return soft.convert(mode)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def llava(image: Image.Image, size: int) -> torch.Tensor:
    """LLaVA's `process_images` with image_aspect_ratio `pad`: expand2square, then CLIPImageProcessor's steps in fp32."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in CLIP[0]))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255.0).permute(2, 0, 1)
    return (pixels - torch.tensor(CLIP[0])[:, None, None]) / torch.tensor(CLIP[1])[:, None, None]


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")])
@pytest.mark.parametrize("size", [(50, 37), (20, 64), (32, 32), (9, 11), (1, 70)])
def test_pillow_pixels_normalised_are_llavas_bit_for_bit(mode, kind, size):
    data = encode(photo(mode, size), kind)
    pixels = tower().preprocess(data)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), torch.uint8)
    assert torch.equal(tower().normalise(pixels[None])[0], llava(Image.open(io.BytesIO(data)), 32))


def test_normalising_is_exact_for_every_value():
    """All 256 values of each channel, against numpy's fp32 arithmetic."""
    values = torch.arange(256, dtype=torch.uint8)[None, :, None, None].expand(1, 256, 1, 3)
    got = tower().normalise(values).numpy()
    for channel in range(3):
        scaled = np.arange(256, dtype=np.uint8).astype(np.float32) / 255.0
        expected = (scaled - np.float32(CLIP[0][channel])) / np.float32(CLIP[1][channel])
        assert np.array_equal(got[0, channel, :, 0], expected)


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")])
@pytest.mark.parametrize("size", [(640, 480), (300, 420), (64, 64), (1500, 900), (40, 30)])
def test_fast_pixels_are_close_to_pillows(mode, kind, size):
    """Inside the picture within two of 255 levels on average; the border has the same colour, within a pixel of its edge."""
    data = encode(photo(mode, size), kind)
    pillow, fast = llava_pixels(data, 64, GREY).int(), fast_pixels(data, 64, GREY).int()
    assert (fast.shape, fast_pixels(data, 64, GREY).dtype) == ((64, 64, 3), torch.uint8)
    top, left = (round(64 - 64 * side / max(size)) // 2 + 1 if side < max(size) else 0 for side in (size[1], size[0]))
    inside = (slice(top, 64 - top), slice(left, 64 - left))
    assert (fast - pillow)[inside].abs().float().mean() < 2
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[max(top - 3, 0) : 64 - max(top - 3, 0), max(left - 3, 0) : 64 - max(left - 3, 0)] = False
    assert (fast[outside] == torch.tensor(GREY)).all()


def test_both_decoders_raise_for_a_broken_image():
    complete = encode(photo("RGB", (90, 60)), "JPEG")
    assert torch.equal(fast_pixels(complete + b"after its end", 64, GREY), fast_pixels(complete, 64, GREY))
    for broken in (complete[: len(complete) // 2], complete[:3], b"no image", b""):
        for decoder in (llava_pixels, fast_pixels):
            with pytest.raises((OSError, SyntaxError, ValueError)):
                decoder(broken, 64, GREY)


def test_video_frames_give_the_same_pixels():
    frame = photo("RGB", (80, 45))
    assert torch.equal(fast_pixels(frame, 64, GREY), fast_pixels(encode(frame, "PNG"), 64, GREY))
    assert torch.equal(llava_pixels(frame, 64, GREY), llava_pixels(encode(frame, "PNG"), 64, GREY))


def test_the_decoder_is_part_of_the_identity_and_the_default_changes_nothing():
    torch.manual_seed(0)
    plain, other = tower(), tower(decoder="fast")
    other.net.load_state_dict(plain.net.state_dict())
    facts = {"pad": "square, mean colour", "resize": "bicubic", "size": 32, "mean": CLIP[0], "std": CLIP[1], "rgb": RGB_RULE}
    assert plain.preprocessing == tower(decoder="pil").preprocessing == facts  # these keys make the hashes of outputs
    assert other.preprocessing == {**facts, "decoder": "fast"}
    assert plain.identity != other.identity
    data = encode(photo("RGB", (90, 60)), "JPEG")
    assert torch.equal(other.preprocess(data), fast_pixels(data, 32, GREY))


TOWERS = {
    "pad": {},
    "fast": {"decoder": "fast"},
    "squeeze": {"fit": "squeeze"},
    "anyres": {"grid_pinpoints": [[32, 64], [64, 32]]},
}


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
def test_every_tower_sees_the_picture_in_unusual_images(changes):
    """Grey of 16 bits is the ramp that it shows, transparent black is white; as encoded bytes and as an image of Pillow's."""
    wide = ramp(256, 256)
    transparent = Image.new("RGBA", (64, 64))
    transparent.paste((0, 0, 255, 255), (32, 0, 64, 64))
    for source in (encode(Image.fromarray(wide), "PNG"), Image.fromarray(wide)):
        for view in tower(**changes).tiles(source)[0][:1].float():
            columns = view.mean((0, 2))
            assert (columns.diff() > 4).all()
            assert abs(columns.mean() - 127.5) < 1
            assert (columns[0] < 6, columns[-1] > 249) == (True, True)
    for source in (encode(transparent, "PNG"), transparent):
        for view in tower(**changes).tiles(source)[0][:1]:
            assert (view[:, :14] == 255).all()
            assert (view[:, 18:] == torch.tensor([0, 0, 255])).all()
    for source in (encode(Image.new("F", (4, 4)), "TIFF"), Image.new("F", (4, 4))):
        with pytest.raises(ImageFault, match="unsupported_format: pixels are floating-point"):
            tower(**changes).tiles(source)


def test_a_tower_takes_pixels_and_nothing_normalised():
    with pytest.raises(ValueError, match=r"expected \(F, S, S, 3\) uint8"):
        tower()(torch.zeros(1, 3, 32, 32))
