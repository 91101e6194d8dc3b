"""Writes Parquet files of uncompressed PLAIN values, one page for each column of a row group, from the caller's own buffers.

pyarrow's writer copies such values four times (encoder, page, file object, system) and takes longer for it than the disk; here
the system copies them once, while another thread hashes them. Format: https://parquet.apache.org/docs/file-format/ and its
parquet.thrift, in Thrift's compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from voco.store import storage
from voco.store.schemas import SCHEMA_VERSION

MAGIC = b"PAR1"
ALIGNMENT = 64  # bytes: where the values of a page begin that have a fixed width, so that a mapped file gives aligned numbers
PLAIN, RLE = 0, 3  # encodings
OPTIONAL, UTF8 = 1, 0
BYTE_ARRAY, FIXED = 6, 7
# physical types by Arrow's; binary of a fixed width is FIXED
PHYSICAL = {pa.string(): BYTE_ARRAY, pa.int32(): 1, pa.int64(): 2, pa.float64(): 5}
CREATED_BY = b"voco"

Value = tuple[int, bytes]  # Thrift: the type of a field, and its bytes


class Chunk(NamedTuple):
    """A column chunk in the file: one page."""

    page: int  # offset of its header
    size: int  # bytes of header and content


def write_plain_table(
    uri: str, groups: Iterable[pa.Table], schema: pa.Schema, metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write a file whose row groups are `groups`, without nulls; a failure leaves no file. Columns may have several chunks.

    Returns the file's manifest entry: path (its name), rows, bytes, sha256. The same rows give the same bytes.
    Raises ValueError for a null and KeyError for a column of another type than PHYSICAL has.
    """
    schema = schema.with_metadata({"voco.schema_version": SCHEMA_VERSION, **(metadata or {})})
    rows = 0
    row_groups: list[Value] = []
    with storage.open_write(uri) as handle:
        handle.write(MAGIC)
        for group in groups:
            chunks = [_write_chunk(handle, group[field.name], field.type) for field in schema]
            row_groups.append(_row_group(schema, chunks, group.num_rows))
            rows += group.num_rows
        footer = _footer(schema, row_groups, rows)
        handle.write(footer + len(footer).to_bytes(4, "little") + MAGIC)
    return {"path": uri.rsplit("/", 1)[-1], "rows": rows, "bytes": handle.size, "sha256": handle.sha256()}


def defined_levels(rows: int) -> bytes:
    """The definition levels of `rows` values of which none is null, with their length before them: one run of ones.

    https://parquet.apache.org/docs/file-format/data-pages/encodings/#run-length-encoding--bit-packing-hybrid-rle--3
    """
    run = _varint(rows << 1) + b"\1"
    return len(run).to_bytes(4, "little") + run


def _write_chunk(handle: storage.Hashing, column: pa.ChunkedArray, kind: pa.DataType) -> Chunk:
    if column.null_count or column.type != kind:
        raise ValueError(f"expected {kind} without null, got {column.type} with {column.null_count}")
    values = list(_plain(column))
    levels = defined_levels(len(column))
    content = len(levels) + sum(map(len, values))
    header = _struct(
        {1: _i32(0), 2: _i32(content), 3: _i32(content), 5: _data_page(len(column))}  # type (DATA_PAGE), sizes, DataPageHeader
    )[1]
    padding = -(handle.size + len(header) + len(levels)) % ALIGNMENT if pa.types.is_fixed_size_binary(kind) else 0
    page = handle.size + padding
    if pa.types.is_fixed_size_binary(kind):
        handle.write(bytes(padding) + header + levels)
        for part in values:
            handle.write(part)
    else:  # few bytes
        handle.write(b"".join([header, levels, *values]))
    return Chunk(page, len(header) + content)


def _plain(column: pa.ChunkedArray) -> Iterator[bytes | memoryview]:
    """The values, little-endian; a string after its length in four bytes."""
    for array in column.chunks:
        if pa.types.is_string(array.type):
            texts = [text.encode() for text in array.to_pylist()]
            yield b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        else:
            width = array.type.bit_width // 8
            yield memoryview(array.buffers()[1]).toreadonly()[array.offset * width :][: len(array) * width]


def _row_group(schema: pa.Schema, chunks: Sequence[Chunk], rows: int) -> Value:
    columns = []
    for field, chunk in zip(schema, chunks, strict=True):
        size = _i64(chunk.size)
        facts = {
            1: _i32(PHYSICAL.get(field.type, FIXED)),
            2: _list([_i32(PLAIN), _i32(RLE)]),
            3: _list([_binary(field.name.encode())]),
            4: _i32(0),  # uncompressed
            5: _i64(rows),
            6: size,
            7: size,
            9: _i64(chunk.page),
        }
        columns.append(_struct({2: _i64(0), 3: _struct(facts)}))
    total = _i64(sum(chunk.size for chunk in chunks))
    return _struct({1: _list(columns), 2: total, 3: _i64(rows), 5: _i64(chunks[0].page), 6: total})


def _footer(schema: pa.Schema, row_groups: Sequence[Value], rows: int) -> bytes:
    """FileMetaData. Its `ARROW:schema` is from where pyarrow takes Arrow types and metadata."""
    pairs = {**(schema.metadata or {}), b"ARROW:schema": base64.b64encode(schema.serialize().to_pybytes())}
    elements = [_struct({4: _binary(b"schema"), 5: _i32(len(schema))}), *map(_schema_element, schema)]
    metadata = [_struct({1: _binary(key), 2: _binary(value)}) for key, value in pairs.items()]
    facts = {1: _i32(1), 2: _list(elements), 3: _i64(rows), 4: _list(row_groups), 5: _list(metadata), 6: _binary(CREATED_BY)}
    return _struct(facts)[1]


def _schema_element(field: pa.Field) -> Value:
    facts = {3: _i32(OPTIONAL), 4: _binary(field.name.encode())}
    if field.type in PHYSICAL:
        facts[1] = _i32(PHYSICAL[field.type])
    elif pa.types.is_fixed_size_binary(field.type):
        facts |= {1: _i32(FIXED), 2: _i32(field.type.byte_width)}
    else:
        raise KeyError(f"column {field.name}: {field.type} cannot be written as plain values")
    if pa.types.is_string(field.type):
        facts |= {6: _i32(UTF8), 10: _struct({1: _struct({})})}  # LogicalType.STRING
    return _struct(facts)


def _data_page(rows: int) -> Value:
    return _struct({1: _i32(rows), 2: _i32(PLAIN), 3: _i32(RLE), 4: _i32(RLE)})


# ---- Thrift's compact protocol ------------------------------------------------------------------------------------


def _varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def _zigzag(number: int) -> bytes:
    return _varint(number << 1)  # no number here is negative


def _i32(number: int) -> Value:
    if not 0 <= number < 1 << 31:
        raise ValueError(f"expected a number below 2^31, got {number}: a page is larger than 2 GiB")
    return 5, _zigzag(number)


def _i64(number: int) -> Value:
    return 6, _zigzag(number)


def _binary(data: bytes) -> Value:
    return 8, _varint(len(data)) + data


def _list(values: Sequence[Value]) -> Value:
    kind = values[0][0] if values else 12
    size = bytes([len(values) << 4 | kind]) if len(values) < 15 else bytes([0xF0 | kind]) + _varint(len(values))
    return 9, size + b"".join(data for _, data in values)


def _struct(fields: dict[int, Value]) -> Value:
    data, last = [], 0
    for number, (kind, content) in sorted(fields.items()):
        data.append(bytes([number - last << 4 | kind]) + content)
        last = number
    return 12, b"".join(data) + b"\0"
