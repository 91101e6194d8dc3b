"""Source rows to the work list: rows about the same media become one sample. Memory use does not depend on the file's size.

Rows go to buckets on disk by a hash of their sample id, and one bucket at a time is grouped in memory. A small file is a
single bucket that stays in memory. The number of buckets depends on the size of the source file only, so the same file
always gives the same list: bucket by bucket, samples in the order of their first source row, conversations by source row.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import marshal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from voco.errors import Refused
from voco.ingest.formats import get_format
from voco.ingest.source_row import Reject, SourceRow, sample_id
from voco.job.config import Ingest
from voco.run import units
from voco.run.logs import get_logger
from voco.run.prometheus import current_stage
from voco.store import parquet, schemas, storage

log = get_logger(__name__)

BUCKET_BYTES = 16 << 20  # of the source file; its rows take about six times as much memory
MAX_BUCKETS = 512  # files that are open at once
LENGTH_BYTES = 4  # of the number before each row in a bucket's file: the row's size
UNIT_TEXT_BYTES = 256 << 20  # most text of a unit: an Arrow string column holds 2 GiB
REJECT_ROWS = 10_000  # of one row group

WORK = pa.schema(
    [
        ("sample_id", pa.string()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("modality", pa.string()),
        ("paths", pa.list_(pa.string())),
        ("place", pa.string()),  # where the medium is read from when that is not its path, else empty
        ("sources", pa.list_(pa.string())),  # file and row of each conversation
        ("conversations", pa.list_(schemas.CONVERSATION)),
    ]
)


@dataclass(frozen=True)
class SourceListing:
    """Counts of the listing, before any medium is read: read = listed + the sum of `rejected`."""

    read: int  # source rows
    listed: int  # conversations in the work list
    samples: int
    units: int
    rejected: dict[str, int]
    tables: list[dict[str, Any]]  # manifest entry of the part of `rejects/` that holds these rejects, if any
    notes: dict[str, int] = field(default_factory=dict)  # rows by what of them does not reach the model, "system prompts dropped"


def list_samples(block: Ingest, annotations: str, output: str, answers: str | None = None) -> SourceListing:
    """Write the work list unless it exists. A killed run leaves no part of it; the next run starts the list again.

    The rejects and the counts are written before the list, so where the list exists, they exist too.
    """
    counts = storage.join(output, "work", "listing.json")
    if not units.is_listed(output):
        with _no_collector():
            units.write_work_list(output, _units(block, _rows(block, annotations, answers), annotations, output, counts), WORK)
    listing = SourceListing(**storage.read_json(counts))
    current_stage().count_rows(sum(listing.rejected.values()), 0, listing.rejected)
    return listing


def _rows(block: Ingest, annotations: str, answers: str | None) -> Iterable[SourceRow | Reject]:
    source_format = get_format(block.format)
    if answers is not None and not source_format.takes_answers:
        raise Refused(f"inputs.answers: expected nothing: {block.format} has its answers in inputs.annotations")
    return source_format.read(annotations, block, answers)


def _units(block: Ingest, rows: Iterable[SourceRow | Reject], annotations: str, output: str, counts: str) -> Iterator[pa.Table]:
    folder = _scratch(output)
    rejects = _RejectSpool(folder)
    size = storage.file_size(annotations)
    buckets = min(MAX_BUCKETS, max(1, -(-size // BUCKET_BYTES)))
    notes: Counter[str] = Counter()
    read, partition = _partition(block, rows, folder, buckets, rejects, notes)
    listed = samples = units = 0
    for table in _cut(block, _samples(block, partition, rejects)):
        listed += len(table["sources"].combine_chunks().values)
        samples += table.num_rows
        units += 1
        yield table
    tables = rejects.write(block.dataset, storage.join(output, "rejects", "part-listing.parquet"))
    listing = SourceListing(
        read, listed, samples, units, dict(sorted(rejects.counts.items())), tables, dict(sorted(notes.items()))
    )
    storage.write_json(counts, asdict(listing))


GroupRow = tuple[str, bytes, int, str, str, tuple[str, ...], str, dict[str, Any]]  # as `_group_row` returns it


def _group_row(block: Ingest, row: SourceRow) -> GroupRow:
    """What grouping needs of a row: sample id, digest and size of the turns, source, modality, paths, location, conversation."""
    turns = marshal.dumps(row.turns, 2)  # version 2 has no references, so equal turns are equal bytes
    digest = hashlib.blake2b(turns, digest_size=16).digest()
    key = sample_id(block.dataset, block.split, row)
    return key, digest, len(turns), row.source, row.modality, row.paths, row.location, row.conversation


def _partition(
    block: Ingest,
    rows: Iterable[SourceRow | Reject],
    folder: str | None,
    buckets: int,
    rejects: _RejectSpool,
    notes: Counter[str],
) -> tuple[int, Iterator[Iterable[GroupRow]]]:
    """The number of rows, and the accepted rows by bucket, each bucket in source order."""
    read = 0
    in_memory: list[GroupRow] = []
    started = shown = time.monotonic()
    files = [tempfile.TemporaryFile(dir=folder) for _ in range(buckets)] if buckets > 1 else []  # noqa: SIM115 - closed by _load
    for row in rows:
        read += 1
        if isinstance(row, Reject):
            rejects.add(row)
            continue
        notes.update(row.notes)
        if files:
            group_row = _group_row(block, row)
            data = marshal.dumps(group_row, 2)
            files[int(group_row[0][:8], 16) % buckets].write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        else:
            in_memory.append(_group_row(block, row))
        if not read % 1000 and time.monotonic() - shown > 5:
            shown = time.monotonic()
            log.info(f"ingest: listed {read:,} rows, {read / (shown - started):,.0f} rows/s")
    return read, map(_load, files) if files else iter([in_memory])


def _load(file: IO[bytes]) -> Iterator[GroupRow]:
    with file:
        file.seek(0)
        data = memoryview(file.read())
    at = 0
    while at < len(data):
        start = at + LENGTH_BYTES
        at = start + int.from_bytes(data[at:start], "little")
        yield marshal.loads(data[start:at])


def _samples(block: Ingest, buckets: Iterator[Iterable[GroupRow]], rejects: _RejectSpool) -> Iterator[dict[str, Any]]:
    """The samples bucket by bucket, without duplicates."""
    for bucket in buckets:
        samples: dict[str, dict[str, Any]] = {}
        distinct: set[tuple[str, bytes]] = set()
        for key, turns, size, source, modality, paths, location, conversation in bucket:
            sample = samples.get(key)
            if sample is None:
                sample = samples[key] = {
                    "sample_id": key, "dataset": block.dataset, "split": block.split, "modality": modality,
                    "paths": paths, "place": location, "sources": [], "conversations": [], "size": 0,
                }  # fmt: skip
            elif sample["place"] != location:  # two media of the same name: the row may mean either
                rejects.add(Reject(source, "duplicate", f"{paths[0]} is already at {sample['place']}"))
                continue
            if block.duplicates == "reject":
                if (key, turns) in distinct:
                    rejects.add(Reject(source, "duplicate", f"sample {key} has these turns already"))
                    continue
                distinct.add((key, turns))
            sample["size"] += size
            sample["sources"].append(source)
            sample["conversations"].append(conversation)
        yield from samples.values()


def _cut(block: Ingest, samples: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    unit: list[dict[str, Any]] = []
    size = 0
    for sample in samples:
        unit.append(sample)
        size += sample["size"]
        if len(unit) == block.unit_rows or size > UNIT_TEXT_BYTES:
            yield parquet.to_table(unit, WORK)
            unit, size = [], 0
    if unit:
        yield parquet.to_table(unit, WORK)


class _RejectSpool:
    """Rejects on disk until the list is complete, because every row may be a reject."""

    def __init__(self, folder: str | None) -> None:
        self.counts: Counter[str] = Counter()
        self.file = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115 - closed by `write`

    def add(self, reject: Reject) -> None:
        self.counts[reject.reason] += 1
        self.file.write(json.dumps([reject.source, reject.reason, reject.detail]) + "\n")

    def write(self, dataset: str, uri: str) -> list[dict[str, Any]]:
        """Write the rejects as one Parquet file. Returns its manifest entry, or nothing without rejects."""
        with self.file:
            return [parquet.write_table(uri, self._groups(dataset), schemas.REJECTS)] if self.counts else []

    def _groups(self, dataset: str) -> Iterator[pa.Table]:
        self.file.seek(0)
        keys = ("source", "reason", "detail")
        rows = ({"dataset": dataset, **dict(zip(keys, json.loads(line), strict=True))} for line in self.file)
        while batch := list(itertools.islice(rows, REJECT_ROWS)):
            yield parquet.to_table(batch, schemas.REJECTS)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Turns Python's cycle collector off: rows have no cycles, and it would visit millions of their objects repeatedly."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _scratch(output: str) -> str | None:
    """Folder of the temporary files, which have no name and end with the process: in a local output; None for the system's."""
    if output.startswith("s3://"):
        return None
    folder = Path(output) / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
