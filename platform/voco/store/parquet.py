"""Writes every Parquet file with the same options, and opens it from disk or S3."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from voco.store import storage
from voco.store.schemas import ROW_GROUP_BYTES, SCHEMA_VERSION, UNCOMPRESSED


def leaf_columns(schema: pa.Schema) -> list[tuple[str, str]]:
    """The Parquet column paths of a schema, each with the name of its innermost field."""

    def walk(prefix: str, name: str, kind: pa.DataType) -> list[tuple[str, str]]:
        if pa.types.is_struct(kind):
            return [leaf for field in kind for leaf in walk(f"{prefix}.{field.name}", field.name, field.type)]
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return walk(f"{prefix}.list.element", name, kind.value_type)
        return [(prefix, name)]

    return [leaf for field in schema for leaf in walk(field.name, field.name, field.type)]


def to_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """The values as an array, level by level: several times as fast as pyarrow's own conversion of nested dicts.

    No struct or list may be null.
    """
    if pa.types.is_struct(kind):
        return pa.StructArray.from_arrays(
            [to_array([value[field.name] for value in values], field.type) for field in kind], fields=kind
        )
    if pa.types.is_list(kind):
        offsets = pa.array(list(accumulate(map(len, values), initial=0)), pa.int32())
        return pa.ListArray.from_arrays(offsets, to_array(list(chain.from_iterable(values)), kind.value_type), type=kind)
    if pa.types.is_large_binary(kind) and None not in values:
        offsets = pa.array(list(accumulate(map(len, values), initial=0)), pa.int64())
        return pa.LargeBinaryArray.from_buffers(kind, len(values), [None, offsets.buffers()[1], pa.py_buffer(b"".join(values))])
    return pa.array(values, kind)


def to_table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table. Each has every key of the schema."""
    columns = [to_array([row[field.name] for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def write_table(
    uri: str,
    groups: Iterable[pa.Table],
    schema: pa.Schema,
    metadata: dict[str, str] | None = None,
    encodings: dict[str, str] | None = None,
    footer: list[pq.FileMetaData] | None = None,
    statistics: bool = True,
) -> dict[str, Any]:
    """Write one Parquet file whose row groups are `groups`; a failure leaves no file.

    Returns the file's manifest entry: path (its name), rows, bytes, sha256. The same rows give the same bytes. `encodings` names
    columns that have an encoding other than a dictionary, and no statistics; the file's footer is added to `footer`.
    Without `statistics` the footer is about half as long.
    """
    schema = schema.with_metadata({"voco.schema_version": SCHEMA_VERSION, **(metadata or {})})
    uncompressed = {path for path, name in leaf_columns(schema) if name in UNCOMPRESSED}
    compression = {path: "none" if path in uncompressed else "zstd" for path, _ in leaf_columns(schema)}
    encoded = [path for path, _ in leaf_columns(schema) if path not in uncompressed and path not in (encodings or {})]
    rows = 0
    with (
        storage.open_write(uri) as handle,
        pq.ParquetWriter(
            handle,
            schema,
            compression=compression,
            use_dictionary=encoded,
            write_statistics=encoded if statistics else False,
            store_schema=True,
            column_encoding=encodings,
            metadata_collector=footer,
        ) as writer,  # fmt: skip
    ):
        for group in groups:
            writer.write_table(group.cast(schema), row_group_size=max(1, group.num_rows))
            rows += group.num_rows
    return {"path": uri.rsplit("/", 1)[-1], "rows": rows, "bytes": handle.size, "sha256": handle.sha256()}


def slices_by_bytes(sizes: list[int], limit: int = ROW_GROUP_BYTES) -> list[tuple[int, int]]:
    """Cut consecutive rows into [start, stop) groups of at most `limit` bytes; a larger row is a group alone."""
    cuts: list[tuple[int, int]] = []
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            cuts.append((start, index))
            start, total = index, 0
        total += size
    if start < len(sizes):
        cuts.append((start, len(sizes)))
    return cuts


def open_parquet(uri: str) -> pq.ParquetFile:
    """An open Parquet file. Raises FileNotFoundError."""
    fs, path = storage.arrow_filesystem(uri)
    return pq.ParquetFile(fs.open_input_file(path))


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """One complete Parquet file, or some of its columns. Raises FileNotFoundError."""
    with open_parquet(uri) as file:
        return file.read(columns=columns)


def with_added_columns(table: pa.Table, schema: pa.Schema, added: Iterable[str]) -> pa.Table:
    """The table with nulls in the columns of `schema` that an earlier version did not write."""
    for name in added:
        if name not in table.column_names:
            table = table.append_column(schema.field(name), pa.nulls(table.num_rows, schema.field(name).type))
    return table
