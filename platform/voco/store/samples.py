"""The one reader of `samples/` tables: their parts and row groups, rows by address or id, media from the row or from `blobs/`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from voco.store import index, parquet, schemas, storage
from voco.store.distinct import distinct_rows
from voco.store.part_files import PartFiles, read_in_order

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

    A sample is a complete row under `share_vision`, else one conversation of it (the papers' batch mix). Opening reads the
    tables' indexes and no part; reading is thread-safe. Raises Refused for an output without an index.
    """

    def __init__(self, uris: Sequence[str], share_vision: bool = True) -> None:
        self.uris = tuple(uris)
        columns = [name for name in schemas.SAMPLES_INDEX.names if name != "sizes"]
        tables = index.read_table_indexes(uris, schemas.SAMPLES_INDEX, columns)
        self._facts = pa.concat_tables([table.replace_schema_metadata(None) for table in tables]).combine_chunks()
        self._firsts = [table.slice(0, 1).to_pylist() for table in tables]
        counted = "rows" if share_vision else "conversations"
        self.sizes: tuple[int, ...] = tuple(self._facts[counted].to_pylist())  # samples of each row group
        # the table of each row group, by its position in `uris`
        self.owners = tuple(owner for owner, table in enumerate(tables) for _ in range(table.num_rows))
        self._files = PartFiles()

    def read(self, group: int, columns: Sequence[str] = COLUMNS) -> list[Row]:
        """The rows of one row group. Media bytes only if `columns` names them."""
        return list(self.read_table(group, columns).to_pylist())

    def read_table(self, group: int, columns: Sequence[str]) -> pa.Table:
        """The same as a table."""
        part, number = self.address(group)
        return self._files.read_row_group(part, number, columns, self._facts["part_bytes"][group].as_py())

    def address(self, group: int) -> tuple[str, int]:
        """The URI of the part, and the number in it, of a row group."""
        part = self._facts["part"][group].as_py()
        return storage.join(self.uris[self.owners[group]], "samples", part), self._facts["row_group"][group].as_py()

    def tables(self, columns: Sequence[str], groups: Iterable[int] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Columns of every row group, or of `groups`, in order: its number and its rows. Several are read at a time."""
        numbers = range(len(self.sizes)) if groups is None else groups
        return read_in_order(lambda group: (group, self.read_table(group, columns)), numbers)

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Every row of every table, in order."""
        for _, table in self.tables(columns):
            yield from table.to_pylist()

    def groups_with_media(self) -> list[int]:
        """The row groups that have an image or a video."""
        media = pc.add(self._facts["image_rows"], self._facts["video_rows"])
        return list(pc.indices_nonzero(media).to_pylist())

    @property
    def has_videos(self) -> bool:
        return bool(pc.sum(self._facts["video_rows"]).as_py())

    @property
    def most_views(self) -> int:
        """Media of the row that has most of them."""
        return int(pc.max(self._facts["views_at_most"]).as_py() or 0)

    def first_rows(self) -> Iterator[tuple[str, bool]]:
        """The first row of each table that has rows: its `sample_id`, and whether each conversation ends on a user turn."""
        return ((row["first_id"], row["first_asks"]) for rows in self._firsts for row in rows)

    def media_sizes(self) -> Iterator[list[tuple[int, int]]]:
        """Every list of heights and widths in pixels that a row's media have, from the indexes; some more than once."""
        for uri in self.uris:
            for group in index.read_table_index(uri, schemas.SAMPLES_INDEX, ["sizes"])["sizes"].to_pylist():
                yield from (list(zip(sizes[::2], sizes[1::2], strict=True)) for sizes in group)


def part_uris(uris: Iterable[str]) -> Iterator[str]:
    """The files of the `samples/` tables of these outputs, in order."""
    for uri in uris:
        folder = storage.join(uri, "samples")
        yield from (storage.join(folder, name) for name in storage.list_names(folder))


def row_addresses(uris: Iterable[str], with_media: bool = False) -> Iterator[Row]:
    """Every row of the tables, or every row that has media: its `ROW_ADDRESS` and `sample_id`."""
    tables = SampleTables(list(uris))
    groups = tables.groups_with_media() if with_media else None
    for number, table in tables.tables(["sample_id", "modality"], groups):
        part, group = tables.address(number)
        for row, sample in enumerate(table.to_pylist()):
            if sample["modality"] != "text" or not with_media:
                yield {"part": part, "group": group, "row": row, "sample_id": sample["sample_id"]}


def unique_images(uris: Iterable[str]) -> Iterator[Row]:
    """Every image of the tables once, at the first row that has it: rows of `IMAGE_ADDRESS`. They wait on disk, not in memory."""
    return distinct_rows(_images(SampleTables(list(uris))), "sha256", IMAGE_ADDRESS)


def _images(tables: SampleTables) -> Iterator[Row]:
    for number, table in tables.tables(["modality", MEDIA_SHA256], tables.groups_with_media()):
        part, group = tables.address(number)
        for row, sample in enumerate(table.to_pylist()):
            for medium, sha256 in enumerate(images_of(sample) if sample["modality"] == "image" else []):
                yield {"sha256": sha256, "part": part, "group": group, "row": row, "medium": medium}


def read_at(addresses: Iterable[Row], columns: Sequence[str] = COLUMNS, media: bool = False) -> Iterator[Row]:
    """The rows at `ROW_ADDRESS`es, in the order of the list. Consecutive rows of one row group cost one read.

    Under `media` each medium has its bytes, from the row or from `blobs/`; `columns` must then have all of `media`.
    """
    files = PartFiles()
    for (part, group), in_group in groupby(addresses, key=lambda address: (address["part"], address["group"])):
        rows = files.read_row_group(part, group, columns).to_pylist()
        for address in in_group:
            row = rows[address["row"]]
            for medium in (row["media"] or []) if media else []:
                medium["bytes"] = medium_bytes(medium, part)
            yield row


def read_images(addresses: Sequence[Row]) -> list[tuple[str, bytes]]:
    """sha256 and encoded bytes of the images at `IMAGE_ADDRESS`es, all of one row group."""
    part, group = addresses[0]["part"], addresses[0]["group"]
    column = PartFiles().read_row_group(part, group, [MEDIA_BYTES])["media"].combine_chunks()
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
