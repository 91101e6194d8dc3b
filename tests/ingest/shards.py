"""Tar shards on the spot: by webdataset's own writer in the layout of img2dataset and video2dataset, and hostile ones by hand."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import webdataset

from voco.job import spec
from voco.job.spec import Job


def sample(key: str, data: bytes | None, caption: str | None = "a boat", extension: str = "jpg", **notes: Any) -> dict[str, Any]:
    """What img2dataset's WebDatasetSampleWriter (1.47.0, writer.py) hands to webdataset's TarWriter."""
    held = {"caption": caption, "url": f"https://host/{key}", "key": key, "status": "success", "error_message": None, **notes}
    found: dict[str, Any] = {"__key__": key, "json": json.dumps(held, indent=4).encode()}
    if caption is not None:
        found["txt"] = caption
    if data is not None:
        found[extension] = data
    return found


def write(place: Path, samples: list[dict[str, Any]]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(place), encoder=True) as writer:
        for one in samples:
            writer.write(one)
    return place


def pack(place: Path, *members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> Path:
    """Members under any names, without the checks of a writer of samples."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w", format=form) as packed:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                packed.addfile(member)
                continue
            head = tarfile.TarInfo(member[0])
            head.size = len(member[1])
            packed.addfile(head, io.BytesIO(member[1]))
    return place


def job(annotations: Path | str, output: Path | str, workers: int = 1, **block: Any) -> Job:
    raw = {
        "name": "shards-test",
        "kind": "ingest",
        "inputs": {"annotations": str(annotations)},
        "output": str(output),
        "resources": {"workers": workers},
        "ingest": {"format": "webdataset", "dataset": "cc3m", "max_reject_share": 1.0, **block},
    }
    return spec.build_job("test.yaml", raw)
