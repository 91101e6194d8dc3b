"""Encoded clips of which each picture spells its number: every container, codec, order of pictures, rate and start time.

`CELLS` is the matrix that the frame reader is tested on, and that `bench/decode.py` counts right answers in.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

BITS = 8
BAND = 16  # rows of pixels for a bit
FRAMES, RATE = 96, 24
SLOW_FROM = 72  # variable rate: from this picture on, one a second
START_S = 1.5

ENCODERS = {
    "mpeg4": ("mpeg4", {"b": "600000"}),
    "msmpeg4": ("msmpeg4", {"b": "600000"}),
    "mjpeg": ("mjpeg", {}),
    "h264": ("libx264", {"preset": "veryfast", "crf": "20"}),
    "hevc": ("libx265", {"preset": "ultrafast", "crf": "20"}),
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "b": "600000"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "b": "600000"}),
    "av1": ("libsvtav1", {"preset": "12", "crf": "30"}),
    "gif": ("gif", {}),
}
CONTAINERS = {
    "mp4": ("mpeg4", "mjpeg", "h264", "hevc", "vp9", "av1"),
    "mov": ("mpeg4", "mjpeg", "h264", "hevc"),
    "matroska": ("mpeg4", "msmpeg4", "mjpeg", "h264", "hevc", "vp8", "vp9", "av1"),
    "webm": ("vp8", "vp9", "av1"),
    "avi": ("mpeg4", "msmpeg4", "mjpeg", "h264"),
    "gif": ("gif",),
}
REORDERS = ("mpeg4", "h264", "hevc")  # codecs that can store pictures in another order than they are shown
VARIANTS = ("plain", "closed B", "open B", "alternate references", "variable rate", "later start", "turned")


class Cell(NamedTuple):
    container: str
    codec: str
    variant: str

    @property
    def variable(self) -> bool:
        return self.variant == "variable rate"


def _exists(container: str, codec: str, variant: str) -> bool:
    if variant in ("closed B", "open B"):
        return codec in REORDERS and (codec, variant) != ("mpeg4", "closed B")  # which FFmpeg's encoder cannot do
    if variant == "alternate references":
        return codec in ("vp8", "vp9")
    if variant in ("variable rate", "later start"):
        return container not in ("avi", "gif")
    return variant == "plain" or container in ("mp4", "mov")


CELLS = [
    Cell(container, codec, variant)
    for container, codecs in CONTAINERS.items()
    for codec in codecs
    for variant in VARIANTS
    if _exists(container, codec, variant)
]


def picture(number: int, width: int = 64) -> np.ndarray:
    """(128, width, 3): a band for each bit of the number, the lowest on top."""
    bands = [(number >> bit & 1) * 200 + 28 for bit in range(BITS)]
    return np.broadcast_to(np.repeat(np.uint8(bands), BAND)[:, None, None], (BITS * BAND, width, 3)).copy()


def read_number(pixels: np.ndarray) -> int:
    """The number that a decoded picture spells."""
    bands = pixels.reshape(BITS, BAND, -1).mean(axis=(1, 2))
    return sum(1 << bit for bit, level in enumerate(bands) if level > 128)


def shown_at(cell: Cell) -> list[float]:
    """When each picture is shown, in seconds after the first."""
    if not cell.variable:
        return [number / RATE for number in range(FRAMES)]
    return [min(number, SLOW_FROM) / RATE + max(0, number - SLOW_FROM) for number in range(FRAMES)]


def clip(cell: Cell, width: int = 64, group: int = 12) -> bytes:
    """The encoded clip: FRAMES pictures, a key picture every `group` at most."""
    encoder, options = ENCODERS[cell.codec]
    options = {**options, "g": str(group), **_order(cell, group)}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=cell.container) as container:
        stream = container.add_stream(encoder, rate=RATE, options=options)
        stream.width, stream.height = width, BITS * BAND
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(cell.codec, "yuv420p")
        stream.codec_context.time_base = Fraction(1, RATE * 10)
        if cell.variant == "turned":
            stream.set_display_rotation(90)
        start = START_S if cell.variant == "later start" else 0
        for number, time in enumerate(shown_at(cell)):
            frame = av.VideoFrame.from_ndarray(picture(number, width), format="rgb24")
            frame.pts, frame.time_base = round((time + start) * RATE * 10), Fraction(1, RATE * 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _order(cell: Cell, group: int) -> dict[str, str]:
    if cell.variant == "alternate references":
        return {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}
    if cell.codec not in REORDERS:
        return {}
    pictures = "0" if cell.variant not in ("closed B", "open B") else "2"
    if cell.codec == "hevc":
        open_gop = int(cell.variant == "open B")
        return {"x265-params": f"keyint={group}:min-keyint={group}:bframes={pictures}:open-gop={open_gop}:log-level=none"}
    flags = {"flags": "+cgop"} if cell.variant == "closed B" else {}
    if cell.codec == "h264":
        flags |= {"x264-params": f"open-gop={int(cell.variant == 'open B')}:scenecut=0"}
    return {"bf": pictures, **flags}
