"""Writes tar shards: with webdataset's writer in the layout of img2dataset and video2dataset, and hostile shards by hand."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import webdataset

from voco.job.load import build_job
from voco.job.spec import Job


def sample(key: str, data: bytes | None, caption: str | None = "a boat", extension: str = "jpg", **notes: Any) -> dict[str, Any]:
    """The sample that img2dataset's WebDatasetSampleWriter (1.47.0, writer.py) passes to webdataset's TarWriter."""
    content = {"caption": caption, "url": f"https://host/{key}", "key": key, "status": "success", "error_message": None, **notes}
    members: dict[str, Any] = {"__key__": key, "json": json.dumps(content, indent=4).encode()}
    if caption is not None:
        members["txt"] = caption
    if data is not None:
        members[extension] = data
    return members


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=True) as writer:
        for entry in samples:
            writer.write(entry)
    return path


def pack(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> Path:
    """A shard with members of any name, without the checks of webdataset's writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as packed:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                packed.addfile(member)
                continue
            head = tarfile.TarInfo(member[0])
            head.size = len(member[1])
            packed.addfile(head, io.BytesIO(member[1]))
    return path


def job(annotations: Path | str, output: Path | str, workers: int = 1, **block: Any) -> Job:
    raw = {
        "name": "shards-test",
        "kind": "ingest",
        "inputs": {"annotations": str(annotations)},
        "output": str(output),
        "resources": {"workers": workers},
        "ingest": {"format": "webdataset", "dataset": "cc3m", "max_reject_share": 1.0, **block},
    }
    return build_job("test.yaml", raw)
