"""Images and conversations out of samples tables, small enough to live inside one HTML file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from voco import rows, storage
from voco.report.outputs import Output

LARGEST_SIDE = 320  # pixels of an image in the report
LARGEST_PIXELS = 64_000_000  # an image above it is not opened


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, or why there is none."""

    uri: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


def picture(media: list[dict[str, Any]]) -> Picture:
    """The first medium of a row, decoded and encoded anew: what the source's bytes hold besides pixels stays out."""
    if not media:
        return Picture(problem="no image: a row of text")
    data = media[0]["bytes"]
    if data is None:
        return Picture(problem="image missing: its bytes are not in the table")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST_PIXELS:
                return Picture(problem=f"image not shown: {image.width} x {image.height} pixels")
            image.draft("RGB", (LARGEST_SIDE, LARGEST_SIDE))
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Picture(problem=f"image missing: cannot be decoded ({type(error).__name__})")
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    held = io.BytesIO()
    if small.getcolors(256):
        small.quantize(256).save(held, "PNG", optimize=True)
        kind = "png"
    else:
        small.save(held, "JPEG", quality=85)
        kind = "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}", small.width, small.height)


def first_rows(output: Output, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a samples table, those with media before rows of text; reads few row groups."""
    found: list[dict[str, Any]] = []
    for file in output.files("samples"):
        if not storage.exists(file):
            continue
        with rows.open_parquet(file) as opened:
            for group in range(min(opened.num_row_groups, 4)):
                found += opened.read_row_group(group).slice(0, count).to_pylist()
                if sum(bool(row["media"]) for row in found) >= count:
                    break
        if len(found) >= count:
            break
    return sorted(found, key=lambda row: not row["media"])[:count]


def rows_by_id(outputs: list[Output], sample_ids: set[str]) -> dict[str, dict[str, Any]]:
    """Rows of samples tables by id. The ids are looked up first, then only the row groups that hold them are read."""
    found: dict[str, dict[str, Any]] = {}
    for file in [file for output in outputs for file in output.files("samples")]:
        wanted = sample_ids - set(found)
        if not wanted or not storage.exists(file):
            continue
        with rows.open_parquet(file) as opened:
            for group in range(opened.num_row_groups):
                held = opened.read_row_group(group, columns=["sample_id"])["sample_id"].to_pylist()
                places = [place for place, sample_id in enumerate(held) if sample_id in wanted]
                if places:
                    for row in opened.read_row_group(group).take(places).to_pylist():
                        found[row["sample_id"]] = row
    return found
