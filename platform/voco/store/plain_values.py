"""Reads values that `plain_parquet.py` wrote as they lie in the file: no page is decoded, and nothing is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from voco.store.plain_parquet import defined_levels

ReadBytes = Callable[[int, int], pa.Buffer]  # start in the file, and size


def is_plain(metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> bool:
    """Whether these columns of a row group may be uncompressed PLAIN values of a fixed width."""
    row_group = metadata.row_group(group)
    chunks = [row_group.column(number) for number in _numbers(row_group, columns)]
    kinds = {(chunk.physical_type, chunk.compression, chunk.has_dictionary_page) for chunk in chunks}
    return kinds == {("FIXED_LEN_BYTE_ARRAY", "UNCOMPRESSED", False)} and row_group.num_rows > 0


def plain_values(metadata: pq.FileMetaData, group: int, columns: Sequence[str], read: ReadBytes) -> pa.Table | None:
    """These columns (`is_plain`) of a row group, in the buffers that `read` gives, of one chunk each.

    None where they are not one page without null before the end of the chunk: read them with pyarrow.
    """
    row_group = metadata.row_group(group)
    rows, arrays = row_group.num_rows, []
    levels = defined_levels(rows)
    for number in _numbers(row_group, columns):
        chunk, width = row_group.column(number), metadata.schema.column(number).length
        end, size = chunk.data_page_offset + chunk.total_compressed_size, rows * width
        if chunk.total_compressed_size < size + len(levels):
            return None
        content = read(end - size - len(levels), size + len(levels))
        if content.slice(0, len(levels)).to_pybytes() != levels:
            return None
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), rows, [None, content.slice(len(levels))]))
    return pa.Table.from_arrays(arrays, names=list(columns))


def _numbers(row_group: pq.RowGroupMetaData, columns: Sequence[str]) -> list[int]:
    by_name = {row_group.column(number).path_in_schema: number for number in range(row_group.num_columns)}
    return [by_name[name] for name in columns]
