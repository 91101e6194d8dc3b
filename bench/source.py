"""Data for the benches: photo-like JPEGs with distinct bytes, and annotation files, URLs and videos to match."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ENCODED = 40  # images that are encoded; the others are copies with other bytes after their end


def pictures() -> list[bytes]:
    """`ENCODED` JPEGs of 640x480, quality 90, about 100 KB each: soft shapes under a camera's noise."""
    draw = np.random.default_rng(0)
    encoded = []
    for _ in range(ENCODED):
        soft = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        noisy = np.asarray(soft, dtype=np.float32) + draw.normal(0, 6.3, (480, 640, 1)).astype(np.float32)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def llava(folder: Path, count: int) -> Path:
    """`mix.json`, `images/` and `urls.parquet`, the same as file:// URLs, of `count` unique images."""
    draw = np.random.default_rng(count)
    encoded = pictures()
    listed = []
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        name = f"{index:06d}.jpg"
        (folder / "images" / name).write_bytes(encoded[index % ENCODED] + draw.bytes(64))
        turns = [
            {"from": "human", "value": f"<image>\nWhat is to be seen in picture {index}?"},
            {"from": "gpt", "value": f"Soft colours, the {index}th time, under the noise of a camera in the dark."},
        ]
        listed.append({"id": f"{index:012d}", "image": name, "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(listed))
    urls = {
        "id": [row["id"] for row in listed],
        "url": [f"file://{folder}/images/{row['image']}" for row in listed],
        "caption": [row["conversations"][1]["value"] for row in listed],
    }
    pq.write_table(pa.table(urls), folder / "urls.parquet")
    return folder


def urls(folder: Path, count: int, address: str) -> Path:
    """`urls.tsv` in CC3M's layout and the same as `urls.parquet`: 2 % are dead links, 1 % lead to bytes that are no image."""
    draw = np.random.default_rng(1)
    encoded = pictures()
    (folder / "served").mkdir(parents=True)
    rows = []
    for index in range(count):
        name = f"{index:06d}.jpg"
        if index % 50 != 7:
            data = draw.bytes(40_000) if index % 100 == 3 else encoded[index % ENCODED] + draw.bytes(64)
            (folder / "served" / name).write_bytes(data)
        rows.append((f"a picture of soft colours, number {index}", f"http://{address}/{name}"))
    with (folder / "urls.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    captions, addresses = zip(*rows, strict=True)
    ids = [f"{index:06d}" for index in range(count)]
    pq.write_table(pa.table({"id": ids, "url": list(addresses), "caption": list(captions)}), folder / "urls.parquet")
    return folder


def videos(folder: Path, count: int, encoded: list[bytes]) -> Path:
    """`videos.csv` in WebVid's layout and `videos/<page_dir>/<videoid>.mp4`: `encoded` repeated, distinct bytes at the end."""
    draw = np.random.default_rng(2)
    rows = []
    for index in range(count):
        page, name = f"{index % 7:06d}_{index % 7:06d}", str(1_000_000 + index)
        (folder / "videos" / page).mkdir(parents=True, exist_ok=True)
        spare = (72).to_bytes(4, "big") + b"free" + draw.bytes(64)  # a free space box: ISO 14496-12 section 8.1.2
        (folder / "videos" / page / f"{name}.mp4").write_bytes(encoded[index % len(encoded)] + spare)
        rows.append((name, f"https://example.org/{name}.mp4", "PT00H00M15S", page, f"soft squares that move, number {index}"))
    with (folder / "videos.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("videoid", "contentUrl", "duration", "page_dir", "name"), *rows])
    return folder
