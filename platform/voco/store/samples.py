"""The one reader of `samples/` tables: their parts and row groups, rows by address or id, media from the row or from `blobs/`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from voco.store import parquet, storage

MEDIA_SHA256, MEDIA_BYTES = "media.list.element.sha256", "media.list.element.bytes"  # column paths
MEDIA_PATH = "media.list.element.path"
IMAGES = [MEDIA_SHA256, "media.list.element.width", "media.list.element.height"]
COLUMNS = ["sample_id", *IMAGES, "conversations"]  # what training and evaluation read, besides features or caches
GROUPS_SEARCHED = 4  # row groups of each part in which `read_first` looks for media

# Rows of work lists: the address of a row of a table, and of an image in the first row that has it.
ROW_ADDRESS = pa.schema([("part", pa.string()), ("group", pa.int32()), ("row", pa.int32())])
IMAGE_ADDRESS = pa.schema([("sha256", pa.string()), *ROW_ADDRESS, ("medium", pa.int32())])

Row = dict[str, Any]


class SampleTables:
    """Row groups of one or more `samples/` tables, numbered consecutively over all of them.

    A sample is a complete row under `share_vision`, else one conversation of it (the papers' batch mix).
    """

    def __init__(self, uris: Sequence[str], share_vision: bool = True) -> None:
        self.groups: list[tuple[pq.ParquetFile, int]] = []  # file, row group in it
        sizes: list[int] = []
        owners: list[int] = []
        for table, uri in enumerate(uris):
            for file in map(parquet.open_parquet, part_uris([uri])):
                for group in range(file.num_row_groups):
                    self.groups.append((file, group))
                    sizes.append(_count_samples(file, group, share_vision))
                    owners.append(table)
        self.sizes = tuple(sizes)  # samples of each row group
        self.owners = tuple(owners)  # the table of each row group, by its position in `uris`

    def read(self, group: int, columns: Sequence[str] = COLUMNS) -> list[Row]:
        """The rows of one row group. Media bytes only if `columns` names them."""
        file, number = self.groups[group]
        rows: list[Row] = file.read_row_group(number, columns=list(columns)).to_pylist()
        return rows

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Every row of every table, in order."""
        for group in range(len(self.groups)):
            yield from self.read(group, columns)


def part_uris(uris: Iterable[str]) -> Iterator[str]:
    """The files of the `samples/` tables of these outputs, in order."""
    for uri in uris:
        folder = storage.join(uri, "samples")
        yield from (storage.join(folder, name) for name in storage.list_names(folder))


def row_addresses(uris: Iterable[str], with_media: bool = False) -> Iterator[Row]:
    """Every row of the tables, or every row that has media: its `ROW_ADDRESS` and `sample_id`."""
    for part, group, file in _row_groups(part_uris(uris)):
        table = file.read_row_group(group, columns=["sample_id", "modality"])
        for row, sample in enumerate(table.to_pylist()):
            if sample["modality"] != "text" or not with_media:
                yield {"part": part, "group": group, "row": row, "sample_id": sample["sample_id"]}


def unique_images(uris: Iterable[str]) -> Iterator[Row]:
    """Every image of the tables once, at the first row that has it: rows of `IMAGE_ADDRESS`."""
    earlier: set[str] = set()
    for part, group, file in _row_groups(part_uris(uris)):
        table = file.read_row_group(group, columns=["modality", MEDIA_SHA256])
        for row, sample in enumerate(table.to_pylist()):
            names = images_of(sample) if sample["modality"] == "image" else []
            for medium, sha256 in enumerate(names):
                if sha256 not in earlier:
                    earlier.add(sha256)
                    yield {"sha256": sha256, "part": part, "group": group, "row": row, "medium": medium}


def read_at(addresses: Iterable[Row], columns: Sequence[str] = COLUMNS, media: bool = False) -> Iterator[Row]:
    """The rows at `ROW_ADDRESS`es, in the order of the list. Consecutive rows of one row group cost one read.

    Under `media` each medium has its bytes, from the row or from `blobs/`; `columns` must then have all of `media`.
    """
    for part, in_part in groupby(addresses, key=lambda address: address["part"]):
        with parquet.open_parquet(part) as file:
            for group, in_group in groupby(in_part, key=lambda address: address["group"]):
                rows = file.read_row_group(group, columns=list(columns)).to_pylist()
                for address in in_group:
                    row = rows[address["row"]]
                    for medium in (row["media"] or []) if media else []:
                        medium["bytes"] = medium_bytes(medium, part)
                    yield row


def read_images(addresses: Sequence[Row]) -> list[tuple[str, bytes]]:
    """sha256 and encoded bytes of the images at `IMAGE_ADDRESS`es, all of one row group."""
    part, group = addresses[0]["part"], addresses[0]["group"]
    with parquet.open_parquet(part) as file:
        column = file.read_row_group(group, columns=[MEDIA_BYTES])["media"].combine_chunks()
    data = column.values.field("bytes")
    offsets = [column.offsets[address["row"]].as_py() + address["medium"] for address in addresses]
    media = [
        {"bytes": data[offset].as_py(), "sha256": address["sha256"]} for offset, address in zip(offsets, addresses, strict=True)
    ]
    return [(medium["sha256"], medium_bytes(medium, part)) for medium in media]


def read_ids(parts: Iterable[str], sample_ids: set[str], columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of these samples. Ids are read first, then only the row groups that have one; missing parts are skipped."""
    remaining = set(sample_ids)
    for part in parts:
        if not remaining or not storage.exists(part):
            continue
        matches: set[str] = set()
        for _, group, file in _row_groups([part]):
            ids = file.read_row_group(group, columns=["sample_id"])["sample_id"].to_pylist()
            rows = [row for row, sample_id in enumerate(ids) if sample_id in remaining]
            if rows:
                matches.update(ids[row] for row in rows)
                yield from file.read_row_group(group, columns=columns).take(rows).to_pylist()
        remaining -= matches


def read_first(parts: Iterable[str], count: int) -> list[Row]:
    """`count` rows from the first row groups, those with media before rows of text; missing parts are skipped."""
    rows: list[Row] = []
    for part in filter(storage.exists, parts):
        for _, group, file in _row_groups([part]):
            rows += file.read_row_group(group).slice(0, count).to_pylist()
            if group + 1 == GROUPS_SEARCHED or sum(bool(row["media"]) for row in rows) >= count:
                break
        if len(rows) >= count:
            break
    return sorted(rows, key=lambda row: not row["media"])[:count]


def first_sample(parts: Iterable[str]) -> Row | None:
    """The first row with media in the first row group of each part, else the first row; missing parts are skipped."""
    first: Row | None = None
    for part in filter(storage.exists, parts):
        with parquet.open_parquet(part) as file:
            rows = file.read_row_group(0).to_pylist() if file.num_row_groups else []
        for row in rows:
            if row["media"]:
                return dict(row)
        first = first or next(iter(rows), None)
    return first


def images_of(row: Row) -> list[str]:
    """Content hashes of a row's media."""
    return [medium["sha256"] for medium in row["media"] or []]


def sizes_of(row: Row) -> list[tuple[int, int]]:
    """Height and width of a row's media, in pixels."""
    return [(medium["height"], medium["width"]) for medium in row["media"] or []]


def blob_uri(output: str, sha256: str) -> str:
    """The file of a medium that is too large for its table."""
    return storage.join(output, "blobs", sha256)


def medium_bytes(medium: Row, part: str) -> bytes:
    """The encoded bytes of a medium of a row of `part`, from the row or from `blobs/`."""
    if medium["bytes"] is not None:
        return bytes(medium["bytes"])
    return storage.read_bytes(blob_uri(part.rsplit("/", 2)[0], medium["sha256"]))


def _row_groups(parts: Iterable[str]) -> Iterator[tuple[str, int, pq.ParquetFile]]:
    """Every row group of the parts: part, number, open file. A part is closed after its last row group."""
    for part in parts:
        with parquet.open_parquet(part) as file:
            for group in range(file.num_row_groups):
                yield part, group, file


def _count_samples(file: pq.ParquetFile, group: int, share_vision: bool) -> int:
    if share_vision:
        return int(file.metadata.row_group(group).num_rows)
    conversations = file.read_row_group(group, columns=["conversations.list.element.source_id"])["conversations"]
    return sum(len(row) for row in conversations.to_pylist())
