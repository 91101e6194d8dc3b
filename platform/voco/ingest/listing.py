"""Source rows to the work list: rows about the same media become one sample, in memory that does not grow with the file.

Rows go to buckets on disk by a hash of their sample id; one bucket at a time is grouped in memory, and a small file is one
bucket that never leaves it. The number of buckets follows from the size of the source file, so the same file gives the same
list: buckets in order, in each the samples by their first source row, in each sample the conversations by source row.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from voco.errors import Refused
from voco.ingest.formats import (
    cc3m_tsv,
    llava_json,
    mmbench_tsv,
    question_jsonl,
    scienceqa,
    seed_json,
    video_chatgpt,
    video_qa,
    webdataset,
    webvid_csv,
)
from voco.ingest.source_row import Reject, SourceRow, sample_id
from voco.job.config import Ingest
from voco.run import units
from voco.store import parquet, schemas, storage

FORMATS: dict[str, Callable[[str, Ingest], Iterator[SourceRow | Reject]]] = {
    "llava_json": llava_json.read,
    "webvid_csv": webvid_csv.read,
    "video_chatgpt": video_chatgpt.read,
    "webdataset": webdataset.read,
    "mmbench_tsv": mmbench_tsv.read,
    "seed_json": seed_json.read,
    "cc3m_tsv": cc3m_tsv.read,
}

# Evaluation sets, which may have their answers in a second file, the third argument.
ANSWERED: dict[str, Callable[[str, Ingest, str | None], Iterator[SourceRow | Reject]]] = {
    "question_jsonl": question_jsonl.read,
    "video_qa": video_qa.read,
    "scienceqa": scienceqa.read,
}

BUCKET_BYTES = 16 << 20  # of the source file; as Python objects about six times that
MAX_BUCKETS = 512  # files open at once
LENGTH = 4  # bytes before each row in a bucket's file: how long it is
UNIT_TEXT_BYTES = 256 << 20  # a unit is cut here too: an Arrow string column ends at 2 GiB
REJECT_ROWS = 10_000  # in one row group

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
    """What came of the source rows before any medium was read. read = listed + the sum of `rejected`."""

    read: int  # source rows
    listed: int  # conversations in the work list
    samples: int
    units: int
    rejected: dict[str, int]
    tables: list[dict[str, Any]]  # the part of `rejects/` with them, if any


def list_samples(block: Ingest, annotations: str, output: str, answers: str | None = None) -> SourceListing:
    """Write the work list, or keep the one that is there. A list cut short by a kill is made again from the start.

    The rejects and the counts are written before the list itself: a list that is there means that they are too.
    """
    counts = storage.join(output, "work", "listing.json")
    if not storage.exists(units.work_list_uri(output)):
        with _no_collector():
            units.write_work_list(output, _units(block, _rows(block, annotations, answers), annotations, output, counts), WORK)
    return SourceListing(**storage.read_json(counts))


def _rows(block: Ingest, annotations: str, answers: str | None) -> Iterator[SourceRow | Reject]:
    if block.format in ANSWERED:
        return ANSWERED[block.format](annotations, block, answers)
    if answers is not None:
        raise Refused(f"inputs.answers: expected nothing: {block.format} has its answers in inputs.annotations")
    return FORMATS[block.format](annotations, block)


def _units(block: Ingest, items: Iterable[SourceRow | Reject], annotations: str, output: str, counts: str) -> Iterator[pa.Table]:
    folder = _scratch(output)
    rejects = _RejectSpool(folder)
    size = storage.file_size(annotations)
    buckets = min(MAX_BUCKETS, max(1, -(-size // BUCKET_BYTES)))
    read, partition = _partition(block, items, folder, buckets, rejects)
    listed = samples = units = 0
    for table in _cut(block, _samples(block, partition, rejects)):
        listed += len(table["sources"].combine_chunks().values)
        samples += table.num_rows
        units += 1
        yield table
    tables = rejects.write(block.dataset, storage.join(output, "rejects", "part-listing.parquet"))
    found = SourceListing(read, listed, samples, units, dict(sorted(rejects.counts.items())), tables)
    storage.write_json(counts, asdict(found))


Row = tuple[str, bytes, int, str, str, tuple[str, ...], str, dict[str, Any]]  # what is kept of an item until it is grouped


def _row(block: Ingest, item: SourceRow) -> Row:
    """Sample id, digest and size of the turns, then the item's own: source, modality, paths, place, conversation."""
    turns = marshal.dumps(item.turns, 2)  # version 2 has no references: equal turns are equal bytes
    digest = hashlib.blake2b(turns, digest_size=16).digest()
    key = sample_id(block.dataset, block.split, item)
    return key, digest, len(turns), item.source, item.modality, item.paths, item.place, item.conversation


def _partition(
    block: Ingest, items: Iterable[SourceRow | Reject], folder: str | None, buckets: int, rejects: _RejectSpool
) -> tuple[int, Iterator[Iterable[Row]]]:
    """How many rows there were, and those that are no rejects by bucket, in source order."""
    read = 0
    held: list[Row] = []
    started = shown = time.monotonic()
    files = [tempfile.TemporaryFile(dir=folder) for _ in range(buckets)] if buckets > 1 else []  # noqa: SIM115 - read later
    for item in items:
        read += 1
        if isinstance(item, Reject):
            rejects.add(item)
        elif files:
            row = _row(block, item)
            data = marshal.dumps(row, 2)
            files[int(row[0][:8], 16) % buckets].write(len(data).to_bytes(LENGTH, "little") + data)
        else:
            held.append(_row(block, item))
        if not read % 1000 and time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"ingest: listed {read:,} rows, {read / (shown - started):,.0f} rows/s", flush=True)
    return read, map(_load, files) if files else iter([held])


def _load(file: IO[bytes]) -> Iterator[Row]:
    with file:
        file.seek(0)
        data = memoryview(file.read())
    at = 0
    while at < len(data):
        start = at + LENGTH
        at = start + int.from_bytes(data[at:start], "little")
        yield marshal.loads(data[start:at])


def _samples(block: Ingest, buckets: Iterator[Iterable[Row]], rejects: _RejectSpool) -> Iterator[dict[str, Any]]:
    """The samples of one bucket after the other, without the duplicates."""
    for bucket in buckets:
        found: dict[str, dict[str, Any]] = {}
        seen: set[tuple[str, bytes]] = set()
        for key, turns, size, source, modality, paths, place, conversation in bucket:
            sample = found.get(key)
            if sample is None:
                sample = found[key] = {
                    "sample_id": key, "dataset": block.dataset, "split": block.split, "modality": modality,
                    "paths": paths, "place": place, "sources": [], "conversations": [], "size": 0,
                }  # fmt: skip
            elif sample["place"] != place:  # one name, two media: which one, nobody can say
                rejects.add(Reject(source, "duplicate", f"{paths[0]} lies at {sample['place']} already"))
                continue
            if block.duplicates == "reject":
                if (key, turns) in seen:
                    rejects.add(Reject(source, "duplicate", f"sample {key} has these turns already"))
                    continue
                seen.add((key, turns))
            sample["size"] += size
            sample["sources"].append(source)
            sample["conversations"].append(conversation)
        yield from found.values()


def _cut(block: Ingest, samples: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    held: list[dict[str, Any]] = []
    size = 0
    for sample in samples:
        held.append(sample)
        size += sample["size"]
        if len(held) == block.unit_rows or size > UNIT_TEXT_BYTES:
            yield parquet.to_table(held, WORK)
            held, size = [], 0
    if held:
        yield parquet.to_table(held, WORK)


class _RejectSpool:
    """Rejects on disk until the list is whole: all rows may be rejects."""

    def __init__(self, folder: str | None) -> None:
        self.counts: Counter[str] = Counter()
        self.file = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115 - closed by `write`

    def add(self, reject: Reject) -> None:
        self.counts[reject.reason] += 1
        self.file.write(json.dumps([reject.source, reject.reason, reject.detail]) + "\n")

    def write(self, dataset: str, uri: str) -> list[dict[str, Any]]:
        """The rejects as one Parquet file; its manifest entry, or nothing when there are none."""
        with self.file:
            return [parquet.write_table(uri, self._groups(dataset), schemas.REJECTS)] if self.counts else []

    def _groups(self, dataset: str) -> Iterator[pa.Table]:
        self.file.seek(0)
        lines = map(json.loads, self.file)
        while held := list(itertools.islice(lines, REJECT_ROWS)):
            keys = ("source", "reason", "detail")
            yield parquet.to_table([{"dataset": dataset, **dict(zip(keys, line, strict=True))} for line in held], schemas.REJECTS)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's cycle collector off: rows make no cycles, and it would walk millions of their objects again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _scratch(output: str) -> str | None:
    """Where temporary files lie: beside a local output, else where the system has them. They have no name and end with us."""
    if output.startswith("s3://"):
        return None
    folder = Path(output) / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
