"""A small `samples/` table of encoded clips: flat pictures that get brighter or darker, with questions about the change."""

from __future__ import annotations

import hashlib
import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import world

SECONDS = 4
SIDE = 64


def encode(shades: list[int]) -> bytes:
    """An mp4 of one flat picture a second, at 2 frames a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(2), options={"crf": "10", "preset": "ultrafast"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for shade in shades:
            for _ in range(2):
                picture = np.full((SIDE, SIDE, 3), shade, dtype=np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def sample_rows(count: int, evaluation: bool = False, first: int = 0) -> list[dict[str, Any]]:
    rows = []
    for index in range(first, first + count):
        draw = np.random.default_rng(index)
        shades = sorted(int(shade) for shade in draw.choice(np.arange(10, 250), SECONDS, replace=False))
        up = bool(draw.integers(2))
        data = encode(shades if up else shades[::-1])
        digest = hashlib.sha256(data).hexdigest()
        medium = {"bytes": data, "path": f"{index}.mp4", "format": "mp4", "sha256": digest, "width": SIDE, "height": SIDE}
        medium |= {"duration_s": float(SECONDS), "fps": 2.0, "num_frames": 2 * SECONDS}
        talk = [
            world.conversation("does it get brighter or darker?", "brighter" if up else "darker", evaluation, "order"),
            world.conversation("is it a video?", "yes", evaluation, "kind"),
        ]
        row = {"sample_id": digest[:32], "dataset": "shades", "split": "test" if evaluation else "train"}
        rows.append({**row, "modality": "video", "media": [medium], "conversations": talk})
    return rows
