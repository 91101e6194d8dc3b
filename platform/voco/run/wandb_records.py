"""Reads W&B's offline record files: a LevelDB log of protobuf records, whose end a kill may have cut."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from voco.store import storage

BLOCK, HEADER = 32768, 7  # bytes; the record file is a LevelDB log


def recorded_steps(output: str, run_id: str) -> set[int]:
    """Training steps in the records of every earlier attempt at a resolved output.

    A killed attempt's local file is cut after its last complete record and written to a new file of the same name: if its
    wandb-core lives a moment longer, it writes into the old file, which nothing reads.
    """
    folder = storage.join(output, "wandb")
    steps: set[int] = set()
    for attempt in storage.list_names(folder):
        uri = storage.join(folder, attempt, f"run-{run_id}.wandb")
        if attempt == "latest-run" or not storage.exists(uri):
            continue
        data = storage.read_bytes(uri)
        end, finished = HEADER, False
        for record, end in read_records(data):  # noqa: B007 - its last value is used below
            kind = record.WhichOneof("record_type")
            finished = finished or kind == "exit"
            items = record.history.item if kind == "history" else ()
            steps |= {int(float(item.value_json)) for item in items if [item.key, *item.nested_key] == ["", "step"]}
        if not finished and "://" not in output:
            storage.write_bytes(uri, data[:end])
    return steps


def is_finished(data: bytes) -> bool:
    """True for the file of an attempt that finished."""
    return any(record.WhichOneof("record_type") == "exit" for record, _ in read_records(data))


def read_records(data: bytes) -> Iterator[tuple[Any, int]]:
    """wandb's records in the bytes of a `run-*.wandb` file, each with the offset of its end.

    Stops before the first record that is cut off or damaged, where a kill ended the file. The format is LevelDB's log with
    wandb's seven bytes in front: blocks of 32 KiB, records in pieces of (crc32, length, type: full, first, middle, last).
    Raises ValueError for another kind of file.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    if data and not data.startswith(b":W&B"[: len(data)]):
        raise ValueError("expected a wandb record file")
    at, parts = HEADER, b""
    while True:
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK  # no header fits: zeros
        if at + HEADER > len(data):
            return
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + HEADER : at + HEADER + length]
        if len(piece) < length or kind not in (1, 2, 3, 4) or zlib.crc32(data[at + 6 : at + 7] + piece) != checksum:
            return
        at += HEADER + length
        parts = piece if kind in (1, 2) else parts + piece
        if kind in (1, 4):
            yield Record.FromString(parts), at
