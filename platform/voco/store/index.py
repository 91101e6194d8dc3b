"""`index.parquet` of `samples/`, `features/` and `frame_cache/`: opening a table reads this file and no part (docs/data.md).

Each unit writes its rows of the index under `work/index/`; the driver joins them, unit by unit, before the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from voco.errors import JobFailed, Refused
from voco.store import parquet, storage
from voco.store.part_files import read_in_order
from voco.store.schemas import FEATURES_INDEX, INDEX_FILE, SAMPLES_INDEX

GROUP_ROWS = 1 << 16  # of a row group of an index
ENCODINGS = {"row_group": "DELTA_BINARY_PACKED", "offset": "DELTA_BINARY_PACKED", "sha256": "PLAIN"}  # where it saves bytes

Digests = npt.NDArray[np.bytes_]  # (n,) S32: raw sha256
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]


def index_uri(output: str) -> str:
    return storage.join(output, INDEX_FILE)


def piece_uri(output: str, unit: int) -> str:
    """A unit's rows of the index of its output."""
    return storage.join(output, "work", "index", f"part-{unit:05d}.parquet")


def write_piece(output: str, unit: int, rows: pa.Table, metadata: dict[str, str] | None = None) -> None:
    """Write a unit's rows. `metadata` is the same for every unit of an output, and becomes the index's."""
    parquet.write_table(piece_uri(output, unit), [rows], rows.schema, metadata, _encodings(rows.schema))


def join_pieces(output: str, units: int, schema: pa.Schema) -> dict[str, Any]:
    """Write `index.parquet` from the pieces of every unit, in order, in memory for GROUP_ROWS rows. Returns its manifest entry.

    Raises JobFailed when units wrote different metadata.
    """
    pieces = read_in_order(_read_file, (piece_uri(output, unit) for unit in range(units)))
    first = next(pieces, None)
    metadata = _metadata(first) if first is not None else {}

    def rows() -> Iterator[pa.Table]:
        if first is None:
            return
        yield first
        for unit, piece in enumerate(pieces, start=1):
            if _metadata(piece) != metadata:
                raise JobFailed(
                    f"{output}: unit {unit} wrote other file metadata than unit 0; submit the job again, with --replace"
                )
            yield piece

    return write_table_index(output, rows(), schema, metadata)


def write_table_index(
    output: str, rows: Iterable[pa.Table], schema: pa.Schema, metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write `index.parquet` in row groups of GROUP_ROWS rows. Returns its manifest entry."""
    return parquet.write_table(index_uri(output), _equal_groups(rows), schema, metadata, _encodings(schema))


def read_table_index(output: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Columns of an output's index, by default all; the file's metadata is the table's. One read.

    Raises Refused for an output without such an index.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(storage.read_bytes(index_uri(output)))) as file:
            if file.schema_arrow.names == schema.names:
                return file.read(columns=columns).replace_schema_metadata(file.schema_arrow.metadata)
    except FileNotFoundError:
        pass
    raise Refused(f"{output}: has no {INDEX_FILE} of this version: run the job that made it again, with --replace")


def read_table_indexes(outputs: Iterable[str], schema: pa.Schema, columns: list[str]) -> list[pa.Table]:
    """The same for several outputs, read side by side."""
    return list(read_in_order(partial(read_table_index, schema=schema, columns=columns), outputs))


def group_facts(table: pa.Table) -> dict[str, Any]:
    """The columns of SAMPLES_INDEX that a row group of `samples/` itself tells."""
    media, conversations = table["media"].combine_chunks(), table["conversations"].combine_chunks()
    texts = conversations.flatten().field("turns").flatten().field("text")
    modalities = {entry["values"]: entry["counts"] for entry in pc.value_counts(table["modality"]).to_pylist()}
    pixels = zip(*(media.flatten().field(name).to_pylist() for name in ("height", "width")), strict=True)
    sizes = {tuple(number for _ in range(count) for number in next(pixels)) for count in _lengths(media)}
    first = conversations[0].as_py() or [] if table.num_rows else []
    return {
        "rows": table.num_rows,
        "conversations": sum(_lengths(conversations)),
        "tokens_at_most": (pc.sum(pc.binary_length(texts)).as_py() or 0) + len(texts),
        "views_at_most": max(_lengths(media), default=0),
        "image_rows": modalities.get("image", 0),
        "video_rows": modalities.get("video", 0),
        "sizes": sorted(sizes),
        "first_id": table["sample_id"][0].as_py() if table.num_rows else None,
        "first_asks": all(conversation["turns"][-1]["role"] == "user" for conversation in first),
    }


def samples_rows(groups: list[dict[str, Any]], parts: list[dict[str, Any]]) -> pa.Table:
    """Rows of SAMPLES_INDEX: the `group_facts` of consecutive row groups, in the `parts` (manifest entries) that have them."""
    rows = []
    remaining = iter(groups)
    for part in parts:
        number, left = 0, part["rows"]
        while left > 0:
            group = next(remaining)
            rows.append({"part": part["path"], "part_bytes": part["bytes"], "row_group": number, **group})
            number, left = number + 1, left - group["rows"]
    return pa.Table.from_pylist(rows, schema=SAMPLES_INDEX)


def features_rows(part: dict[str, Any], footer: pq.FileMetaData, names: list[str], lengths: list[int]) -> pa.Table:
    """Rows of FEATURES_INDEX for a part with one image in each row group: sha256 (hexadecimal) and bytes of each value.

    Such a column chunk is one uncompressed PLAIN data page, whose last bytes are the value
    (https://parquet.apache.org/docs/file-format/data-pages/encodings/).
    """
    offsets = [_value_offset(footer, group, length) for group, length in enumerate(lengths)]
    columns = [raw_digests(names), [part["path"]] * len(names), list(range(len(names))), offsets, lengths]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, FEATURES_INDEX, strict=True)], FEATURES_INDEX)


def raw_digests(names: Iterable[str]) -> Digests:
    """(n,) S32 of hexadecimal sha256."""
    return np.frombuffer(bytes.fromhex("".join(names)), dtype="S32")


def fixed_width(column: pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    """(n,) S-width array of a column of ASCII strings or of fixed-size binary."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        start = array.offset * width
        return np.frombuffer(array.buffers()[1] or b"", dtype=f"S{width}", count=len(array), offset=start)
    width = max(1, pc.max(pc.binary_length(array)).as_py() or 0)
    padded = pc.ascii_rpad(array.cast(pa.large_string()), width=width, padding="\0")
    return np.frombuffer(b"".join(padded.cast(pa.large_binary()).to_pylist()), dtype=f"S{width}")


class Keys:
    """Distinct keys of equal width, sorted and searched by halving, in memory for their bytes and eight more."""

    def __init__(self, keys: npt.NDArray[np.bytes_]) -> None:
        self._prefixes = _prefixes(keys)
        self._order: Numbers | None = np.argsort(self._prefixes, kind="stable")
        self._prefixes, self._keys = self._prefixes[self._order], keys[self._order]

    def take_order(self) -> Numbers:
        """(n,) the row of each position in the array that was given. It is needed once, to sort what belongs to the keys."""
        assert self._order is not None
        order, self._order = self._order, None
        return order

    def __len__(self) -> int:
        return len(self._keys)

    def position(self, key: bytes) -> int | None:
        """Where the key is in the sorted order; None for a key that is not there."""
        wanted = np.array([key])
        if len(key) > self._keys.dtype.itemsize:
            return None
        (prefix,) = _prefixes(wanted.astype(self._keys.dtype))
        at = int(np.searchsorted(self._prefixes, prefix))
        while at < len(self._keys) and self._prefixes[at] == prefix:
            if self._keys[at] == wanted[0]:
                return at
            at += 1
        return None

    def has(self, keys: npt.NDArray[np.bytes_]) -> Mask:
        """(n,) whether each key is there."""
        if not len(self):
            return np.zeros(len(keys), dtype=bool)
        prefixes = _prefixes(keys.astype(self._keys.dtype))
        at = np.minimum(np.searchsorted(self._prefixes, prefixes), len(self) - 1)
        mask: Mask = self._keys[at] == keys
        for row in np.flatnonzero(~mask & (self._prefixes[at] == prefixes)):  # several keys of one prefix
            mask[row] = self.position(bytes(keys[row])) is not None
        return mask


class DigestSet:
    """A growing set of sha256: 32 bytes each, in sorted runs that are joined when a later run is as long."""

    def __init__(self) -> None:
        self._runs: list[Digests] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, digests: Digests) -> Mask:
        """(n,) True where a digest is new, and the first of its kind in the array."""
        unique, first = np.unique(digests, return_index=True)
        is_new = np.ones(len(unique), dtype=bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            is_new &= run[at] != unique
        if is_new.any():
            self._runs.append(unique[is_new])
        while len(self._runs) > 1 and len(self._runs[-1]) >= len(self._runs[-2]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]), kind="stable")]
        mask = np.zeros(len(digests), dtype=bool)
        mask[first[is_new]] = True
        return mask


def _prefixes(keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint64]:
    """(n,) the first eight bytes of each key as a number."""
    padded = keys.astype("S8") if keys.dtype.itemsize < 8 else keys
    data = np.ascontiguousarray(padded).view(np.uint8).reshape(len(padded), padded.dtype.itemsize)
    return np.ascontiguousarray(data[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def _value_offset(footer: pq.FileMetaData, group: int, length: int) -> int:
    """Where the value of a row group of `features/` begins. Raises ValueError for a chunk that is not such a page."""
    row_group = footer.row_group(group)
    chunk = row_group.column(1)
    facts = (row_group.num_rows, chunk.path_in_schema, chunk.compression, chunk.has_dictionary_page)
    header = int(chunk.total_compressed_size) - length
    if facts != (1, "features", "UNCOMPRESSED", False) or not 4 <= header <= 128:
        raise ValueError(f"row group {group} of features/ is no single plain value: {facts}, {header} bytes besides the value")
    return int(chunk.data_page_offset) + header


def _equal_groups(rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows in tables of GROUP_ROWS rows, however they came: an index has the same bytes for any size of units' pieces."""
    pending: list[pa.Table] = []
    count = 0
    for table in rows:
        pending.append(table)
        count += table.num_rows
        while count >= GROUP_ROWS:
            joined = pa.concat_tables(pending)
            yield joined.slice(0, GROUP_ROWS).combine_chunks()
            pending, count = [joined.slice(GROUP_ROWS)], count - GROUP_ROWS
    if count:
        yield pa.concat_tables(pending).combine_chunks()


def _encodings(schema: pa.Schema) -> dict[str, str]:
    return {name: ENCODINGS[name] for name in schema.names if name in ENCODINGS}


def _read_file(uri: str) -> pa.Table:
    with pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri))) as file:
        return file.read().replace_schema_metadata(file.schema_arrow.metadata)


def _metadata(table: pa.Table) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def _lengths(lists: pa.ListArray) -> list[int]:
    """Items of each list; 0 for null."""
    return [count or 0 for count in pc.list_value_length(lists).to_pylist()]


def facts_of(table: pa.Table, key: str) -> Any:
    """The JSON value of the metadata of an index; None if it lacks the key."""
    value = (table.schema.metadata or {}).get(key.encode())
    return None if value is None else json.loads(value)
