"""Frames of an encoded video, by decord (decord2, the maintained release)."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt

from voco.errors import message_line

Frames = npt.NDArray[np.uint8]


class Video:
    """An encoded video. Raises ValueError when it cannot be opened."""

    def __init__(self, data: bytes) -> None:
        import decord

        try:
            self.reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
            self.num_frames = len(self.reader)
            self.fps = float(self.reader.get_avg_fps())
        except (decord.DECORDError, RuntimeError) as error:
            raise ValueError(f"not a video that can be opened: {message_line(error)}") from error
        if self.num_frames == 0 or not 0 < self.fps < math.inf:
            raise ValueError(f"a video of {self.num_frames} frames at {self.fps} fps")

    def frames(self, numbers: list[int]) -> Frames:
        """(F, H, W, 3) uint8 RGB of the frames with these numbers. Raises ValueError for frames that cannot be decoded."""
        import decord

        try:
            frames: Frames = self.reader.get_batch(numbers).asnumpy()
            self.reader.seek(0)  # frees the frames that decord decodes ahead
        except (decord.DECORDError, RuntimeError) as error:
            raise ValueError(f"frames cannot be decoded: {message_line(error)}") from error
        return frames
