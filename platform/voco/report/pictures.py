"""Images and videos of samples tables as small data URIs for one HTML file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from voco.image.encoded import open_image
from voco.image.fault import ImageFault, image_faults
from voco.image.rgb import to_rgb
from voco.report.outputs import Output
from voco.report.table import seconds_text
from voco.store import samples
from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced, thin_evenly

LARGEST_SIDE = 320  # pixels of an image in the report
LARGEST_PIXELS = 64_000_000  # of an image or frame; a larger one is not opened
FRAMES_SHOWN = 8  # of a video, side by side
FRAME_SIDE = 144  # pixels of a frame in the report
FRAME_GAP = 4  # white pixels between two frames


@dataclass(frozen=True)
class Picture:
    """An image as a data URI with a caption, or the reason why there is none."""

    uri: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""
    note: str = ""
    wide: bool = False  # a strip of frames


def picture(row: dict[str, Any]) -> Picture:
    """The first medium of a row of `samples/`: an image, or a strip of a video's frames.

    Pixels are encoded again, so the source's metadata stays out of the report.
    """
    media = row["media"] or []
    if not media:
        return Picture(problem="no image: this sample is text only")
    return _strip(media[0]) if row["modality"] == "video" else _image(media[0])


def _image(medium: dict[str, Any]) -> Picture:
    if medium["bytes"] is None:
        return Picture(problem="image missing: its bytes are not in the table")
    try:
        with image_faults(medium["bytes"]), open_image(medium["bytes"]) as image:
            if image.width * image.height > LARGEST_PIXELS:
                return Picture(problem=f"image not shown: {image.width} x {image.height} pixels")
            image.draft("RGB", (LARGEST_SIDE, LARGEST_SIDE))
            small = to_rgb(image)
    except ImageFault as fault:
        return Picture(problem=f"image missing: cannot be decoded ({fault.reason})")
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return Picture(_data_uri(small), small.width, small.height)


def _strip(medium: dict[str, Any]) -> Picture:
    """Frames from left to right: one per second, as in a frame cache; evenly spaced ones of a long or very short video."""
    facts = _video_facts(medium)
    if medium["bytes"] is None:
        return Picture(problem=f"video not shown: its bytes are not in the table ({facts})")
    if (medium["width"] or 0) * (medium["height"] or 0) > LARGEST_PIXELS:
        return Picture(problem=f"video not shown: frames of {medium['width']} x {medium['height']} pixels ({facts})")
    try:
        video = Video(medium["bytes"])
        numbers = thin_evenly(video.at_rate(1.0), FRAMES_SHOWN)
        if len(numbers) < FRAMES_SHOWN // 2:
            numbers = evenly_spaced(video.num_frames, FRAMES_SHOWN)
        frames = [Image.fromarray(np.asarray(frame)) for frame in video.frames(numbers)]
    except ValueError as error:
        return Picture(problem=f"video not shown: {error} ({facts})")
    for frame in frames:
        frame.thumbnail((FRAME_SIDE, FRAME_SIDE))
    width, height = frames[0].size
    strip = Image.new("RGB", (len(frames) * (width + FRAME_GAP) - FRAME_GAP, height), "white")
    for index, frame in enumerate(frames):
        strip.paste(frame, (index * (width + FRAME_GAP), 0))
    times = ", ".join(f"{time:.3g}" for time in video.times(numbers))
    return Picture(_data_uri(strip), strip.width, strip.height, note=f"{facts}; shown: {times} s", wide=True)


def _video_facts(medium: dict[str, Any]) -> str:
    """Duration, frame rate, number of frames and size as ingest measured them."""
    rate = "rate missing" if medium["fps"] is None else f"{medium['fps']:.4g} fps"
    frames = "number of frames missing" if medium["num_frames"] is None else f"{medium['num_frames']:,} frames"
    return f"{seconds_text(medium['duration_s'])}, {rate}, {frames}, {medium['width']} x {medium['height']}"


def _data_uri(image: Image.Image) -> str:
    encoded = io.BytesIO()
    if image.getcolors(256):
        image.quantize(256).save(encoded, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(encoded, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def first_rows(output: Output, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a samples table, rows with media before text-only rows."""
    return samples.read_first(output.files("samples"), count)


def rows_by_id(outputs: list[Output], sample_ids: set[str]) -> dict[str, dict[str, Any]]:
    """Rows of samples tables by id."""
    parts = [part for output in outputs for part in output.files("samples")]
    return {row["sample_id"]: row for row in samples.read_ids(parts, sample_ids)}
