"""Values of fixed width in a local Parquet file as they lie there, mapped into memory: no copy, no page decoded.

An uncompressed chunk of PLAIN values without null in one data page is a page header, the definition levels with their length
before them, and the values up to its end (https://parquet.apache.org/docs/file-format/data-pages/).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def mapped_values(path: str, metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> pa.Table | None:
    """These columns of a row group, in the mapped file, which stays open as long as they are used. None where a chunk is of
    another form: read it with pyarrow.
    """
    row_group = metadata.row_group(group)
    numbers = {row_group.column(number).path_in_schema: number for number in range(row_group.num_columns)}
    rows, arrays = row_group.num_rows, []
    with pa.memory_map(path) as file:
        for name in columns:
            chunk, width = row_group.column(numbers[name]), metadata.schema.column(numbers[name]).length
            plain = chunk.physical_type == "FIXED_LEN_BYTE_ARRAY" and chunk.compression == "UNCOMPRESSED"
            if not plain or chunk.has_dictionary_page or not rows:
                return None
            end = chunk.data_page_offset + chunk.total_compressed_size
            levels = max(map(len, defined_levels(rows)))
            file.seek(max(0, end - rows * width - levels))
            if not bytes(file.read(levels)).endswith(defined_levels(rows)):
                return None
            values = file.read_buffer(rows * width)
            arrays.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), rows, [None, values]))
    return pa.Table.from_arrays(arrays, names=list(columns))


def defined_levels(rows: int) -> tuple[bytes, ...]:
    """The ways to write the definition levels of `rows` values of which none is null: a run of ones, or up to seven in a byte.

    https://parquet.apache.org/docs/file-format/data-pages/encodings/#run-length-encoding--bit-packing-hybrid-rle--3
    """
    header, count = b"", rows << 1
    while count > 127:
        header, count = header + bytes([count & 127 | 128]), count >> 7
    runs = [header + bytes([count, 1]), *([bytes([3, (1 << rows) - 1])] if rows < 8 else [])]
    return tuple(len(run).to_bytes(4, "little") + run for run in runs)
