"""Writes small LLaVA sources: an annotation file and an image folder."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from voco.job.load import build_job
from voco.job.spec import Job


def image(seed: int, kind: str = "JPEG", size: tuple[int, int] = (48, 32)) -> bytes:
    """An image that differs by seed."""
    picture = Image.new("RGB", size)
    picture.putdata([((x * 7 + seed) % 256, (x * 3 + seed * 5) % 256, (x + seed * 11) % 256) for x in range(size[0] * size[1])])
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def row(identity: Any, path: str | None, *texts: str) -> dict[str, Any]:
    """A row whose turns alternate human, gpt."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": identity, **({} if path is None else {"image": path}), "conversations": turns}


def write(folder: Path, listed: list[Any], images: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mix.json").write_text(json.dumps(listed))
    for path, data in images.items():
        target = folder / "images" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    (folder / "images").mkdir(exist_ok=True)


def good(count: int, images: int) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """`count` rows over `images` images, with every tenth row text only."""
    listed = []
    for index in range(count):
        if index % 10 == 9:
            listed.append(row(index, None, f"Count to {index}.", "One, two."))
        else:
            listed.append(row(f"r{index}", f"set/{index % images:03d}.jpg", f"<image>\nQuestion {index}?", f"Answer {index}"))
    return listed, {f"set/{index:03d}.jpg": image(index) for index in range(images)}


def job(folder: Path | str, output: Path | str, workers: int = 1, **block: Any) -> Job:
    raw = {
        "name": "ingest-test",
        "kind": "ingest",
        "inputs": {"annotations": f"{folder}/mix.json", "media": f"{folder}/images"},
        "output": str(output),
        "resources": {"workers": workers},
        "ingest": {"format": "llava_json", "dataset": "mix", **block},
    }
    return build_job("test.yaml", raw)


def table(output: Path, name: str) -> list[dict[str, Any]]:
    """All rows of a table, in the order of its parts."""
    parts = sorted((output / name).glob("*.parquet"))
    tables = [pq.read_table(part) for part in parts]
    return pa.concat_tables(tables).to_pylist() if tables else []


def part_hashes(output: Path) -> dict[str, str]:
    """sha256 of the index and of every part of both tables, by its name."""
    files = [part for pattern in ("samples/*", "rejects/*", "index.parquet") for part in sorted(output.glob(pattern))]
    return {str(part.relative_to(output)): hashlib.sha256(part.read_bytes()).hexdigest() for part in files}
