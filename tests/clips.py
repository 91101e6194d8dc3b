"""Encoded test videos in which the pixels of a frame give its number."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

SHADES = 8  # frame k is a flat picture of shade 20 + 25 * (k % 8)


def shade(frame: int) -> int:
    return 20 + 25 * (frame % SHADES)


def clip(frames: int, fps: float = 4.0, size: int = 64, offset: int = 0) -> bytes:
    """An mp4 (H.264) of `frames` flat pictures; `offset` shifts the shades, so clips differ."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "10", "preset": "ultrafast"}
        )
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for k in range(frames):
            picture = np.full((size, size, 3), shade(k + offset), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()
