"""A run's checkpoints as files: which are complete, which is the newest, and how old ones go. Without torch, for drivers too.

A checkpoint is `checkpoints/step-XXXXXXXX/` with a file of each rank (`state_shards.py`), `metrics.parquet`, and last
`progress.json`, which names the files with their bytes: without it, or with a file missing or cut, there is no checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from voco.errors import JobFailed
from voco.store import parquet, schemas, storage

FOLDER = "checkpoints"  # of an output
PROGRESS_FILE = "progress.json"
KEPT = 2  # of the newest checkpoints of a run


class UnreadableCheckpoint(JobFailed):
    """The checkpoints of an output cannot be continued by this version. Raised on every rank."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int  # steps that are done
    workers: int  # that wrote it
    files: list[str]  # URIs of their files
    metrics: str  # URI


def step_uri(folder: str, step: int) -> str:
    """The directory of a checkpoint."""
    return storage.join(folder, f"step-{step:08d}")


def steps_in(folder: str) -> list[int]:
    """The steps whose checkpoint was begun, ascending."""
    return [int(name.removeprefix("step-")) for name in storage.list_names(folder) if name.startswith("step-")]


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of the files of a directory by name; none if it does not exist."""
    fs, path = storage.filesystem(uri)
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {str(entry["name"]).rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}


def read_checkpoint(folder: str, step: int) -> Checkpoint | None:
    """The checkpoint of a step; None when it is not complete: `progress.json` or a file that it names is missing or cut."""
    uri = step_uri(folder, step)
    sizes = file_sizes(uri)
    if PROGRESS_FILE not in sizes or schemas.METRICS_FILE not in sizes:
        return None
    progress = storage.read_json(storage.join(uri, PROGRESS_FILE))
    if any(sizes.get(file["name"]) != file["bytes"] for file in progress["files"]):
        return None
    files = [storage.join(uri, file["name"]) for file in progress["files"]]
    return Checkpoint(progress["step"], progress["workers"], files, storage.join(uri, schemas.METRICS_FILE))


def newest(folder: str) -> Checkpoint | None:
    """The complete checkpoint with the most steps. Raises UnreadableCheckpoint for those of an earlier version."""
    for name in storage.list_names(folder):
        uri = storage.join(folder, name)
        if not name.startswith("step-") and any(below.startswith("step-") for below in storage.list_names(uri)):
            raise UnreadableCheckpoint(f"{uri}: a run of an earlier version cannot be continued: use --replace")
    complete = (read_checkpoint(folder, step) for step in reversed(steps_in(folder)))
    return next((checkpoint for checkpoint in complete if checkpoint is not None), None)


def delete_checkpoint(folder: str, step: int) -> None:
    """Remove a checkpoint: first what makes it one, so that a kill leaves none that lacks files."""
    uri = step_uri(folder, step)
    storage.delete_files([storage.join(uri, PROGRESS_FILE)])
    storage.delete(uri)


def delete_old(folder: str, count: int, keep: Collection[int] = ()) -> None:
    """Remove all but the newest `count` checkpoints and those of the steps `keep`, and older ones that are not complete."""
    for step in steps_in(folder)[:-count]:
        if step not in keep:
            delete_checkpoint(folder, step)


def delete_incomplete(folder: str) -> None:
    """Remove what killed workers left. Call it before this run saves."""
    for step in steps_in(folder):
        if read_checkpoint(folder, step) is None:
            delete_checkpoint(folder, step)


def read_metrics(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The steps up to a checkpoint."""
    rows: list[dict[str, Any]] = parquet.read_table(checkpoint.metrics).to_pylist()
    return rows


def write_metrics(uri: str, metrics: list[dict[str, Any]]) -> None:
    """The table of a run's steps so far."""
    parquet.write_table(uri, [pa.Table.from_pylist(metrics, schema=schemas.METRICS)], schemas.METRICS)
