"""Reads row groups of Parquet parts by exact ranges: without read-ahead, with nothing left open, from many threads.

On S3 a footer costs one read (two where it is longer than TAIL_BYTES), a row group one for each run of neighbouring chunks. The
ranges are read here and not by pyarrow: its `pre_buffer` reads from several threads, and a Python file has one position.
"""

from __future__ import annotations

import io
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from voco.store import storage
from voco.store.plain_values import ReadBytes, is_plain, plain_values

TAIL_BYTES = 128 << 10  # read at first for a footer
GAP_BYTES = 64 << 10  # between two chunks that are still read together
FOOTERS = 64  # of the parts used last, compressed: 80 KB in the file for 32 row groups of `samples/`, a quarter of it here
DECODED = 4  # of them, eight times as large as in the file; decoding takes a millisecond or two
THREADS = 16  # reads at a time
MAPPED_BYTES = 256 << 10  # from which values are mapped: a process has at most 65,530 maps (vm.max_map_count)

In = TypeVar("In")
Out = TypeVar("Out")


class Part(NamedTuple):
    """An open part: its footer, compressed by zlib, and its size in bytes."""

    footer: bytes
    size: int


class PartFiles:
    """Row groups of parts; the footers of the last `limit` parts stay in memory. Thread-safe."""

    def __init__(self, limit: int = FOOTERS) -> None:
        self._limit = limit
        self._parts: OrderedDict[str, Future[Part]] = OrderedDict()
        self._lock = Lock()
        self._decode = lru_cache(DECODED)(lambda footer: pq.read_metadata(pa.BufferReader(zlib.decompress(footer))))

    def open(self, uri: str, size: int | None = None) -> Part:
        """The part's footer; a part that another thread is opening is not read twice. Raises FileNotFoundError."""
        with self._lock:
            part = self._parts.get(uri)
            is_new = part is None
            if part is None:
                part = self._parts[uri] = Future()
                if len(self._parts) > self._limit:
                    self._parts.popitem(last=False)
            self._parts.move_to_end(uri)
        if is_new:
            try:
                part.set_result(_read_footer(uri, size))
            except BaseException as error:
                with self._lock:
                    self._parts.pop(uri, None)
                part.set_exception(error)
                raise
        return part.result()

    def read_row_group(self, uri: str, group: int, columns: Sequence[str] | None = None, size: int | None = None) -> pa.Table:
        """Columns of a row group, by default all; a name stands for every path below it. `size` is the part's, if known."""
        footer, size = self.open(uri, size)
        metadata = self._decode(footer)
        fs, path = storage.filesystem(uri)
        if isinstance(fs, LocalFileSystem):
            source = pa.OSFile(path)
        else:
            ranges = join_ranges(chunk_ranges(metadata, group, columns))
            source = pa.PythonFile(_Ranges({start: storage.read_range(fs, path, start, n) for start, n in ranges}, size), "r")
        with source:
            file = pq.ParquetFile(source, metadata=metadata)
            return file.read_row_group(group, columns=None if columns is None else list(columns), use_threads=False)

    def read_values(self, uri: str, group: int, columns: Sequence[str], size: int | None = None) -> pa.Table:
        """As `read_row_group`, for columns of a fixed width, of one chunk each. Values of `plain_parquet.py` are not copied: they
        are in the mapped file, which lives as long as they are used, or in the bytes that were fetched. Do not write to them.
        """
        metadata = self._decode(self.open(uri, size).footer)
        if is_plain(metadata, group, columns):
            table = plain_values(metadata, group, columns, _bytes_of(uri, chunk_ranges(metadata, group, columns)))
            if table is not None:
                return table
        return self.read_row_group(uri, group, columns, size).combine_chunks()


def _bytes_of(uri: str, ranges: Sequence[tuple[int, int]]) -> ReadBytes:
    """Gives bytes inside these ranges: of a mapped file, or fetched where the file is not local or they are few."""
    fs, path = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem) and sum(length for _, length in ranges) >= MAPPED_BYTES:
        with pa.memory_map(path) as file:
            content = file.read_buffer()
        return content.slice  # type: ignore[no-any-return]
    data = {start: pa.py_buffer(storage.read_range(fs, path, start, size)) for start, size in join_ranges(ranges)}

    def read(start: int, size: int) -> pa.Buffer:
        first = max(offset for offset in data if offset <= start)
        return data[first].slice(start - first, size)

    return read


def chunk_ranges(metadata: pq.FileMetaData, group: int, columns: Sequence[str] | None) -> list[tuple[int, int]]:
    """Start and length of the column chunks of a row group, in the order of the file."""
    ranges = []
    row_group = metadata.row_group(group)
    for number in range(row_group.num_columns):
        chunk = row_group.column(number)
        name = chunk.path_in_schema
        if columns is None or any(name == column or name.startswith(f"{column}.") for column in columns):
            first = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
            ranges.append((int(first), int(chunk.total_compressed_size)))
    return sorted(ranges)


def join_ranges(ranges: Iterable[tuple[int, int]], gap: int = GAP_BYTES) -> list[tuple[int, int]]:
    """Sorted ranges (start, length), joined where at most `gap` bytes lie between two."""
    joined: list[tuple[int, int]] = []
    for start, length in ranges:
        if joined and start - sum(joined[-1]) <= gap:
            joined[-1] = (joined[-1][0], start + length - joined[-1][0])
        else:
            joined.append((start, length))
    return joined


def read_in_order(work: Callable[[In], Out], items: Iterable[In], threads: int = THREADS) -> Iterator[Out]:
    """`work` of every item, in order, `threads` at a time; no more than that many results wait to be used."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from map_ahead(pool, work, items, threads)
    finally:
        pool.shutdown(cancel_futures=True)


def map_ahead(pool: Executor, work: Callable[[In], Out], items: Iterable[In], limit: int) -> Iterator[Out]:
    """`work` of every item, in order, on `pool`: at most `limit` calls are started whose results are not yet used."""
    started: deque[Future[Out]] = deque()
    for item in items:
        started.append(pool.submit(work, item))
        if len(started) == limit:
            yield started.popleft().result()
    while started:
        yield started.popleft().result()


def _read_footer(uri: str, size: int | None) -> Part:
    """https://parquet.apache.org/docs/file-format/: metadata, its length in four bytes (little-endian), PAR1."""
    fs, path = storage.filesystem(uri)
    size = int(fs.info(path)["size"]) if size is None else size
    tail = storage.read_range(fs, path, max(0, size - TAIL_BYTES), min(size, TAIL_BYTES))
    length = 8 + int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != b"PAR1" or length > size:
        raise ValueError(f"{uri}: not a Parquet file of {size} bytes")
    if length > len(tail):
        tail = storage.read_range(fs, path, size - length, length)
    return Part(zlib.compress(tail[-length:], level=1), size)


class _Ranges(io.RawIOBase):
    """A file of `size` bytes of which only `data` is there: bytes by their start."""

    def __init__(self, data: dict[int, bytes], size: int) -> None:
        self._data, self._size, self._at = data, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, which must lie in one range. Raises EOFError for bytes that were not read."""
        for start, data in self._data.items():
            if start <= self._at and self._at + size <= start + len(data):
                first, self._at = self._at - start, self._at + size
                return data[first : first + size]
        raise EOFError(f"bytes {self._at} to {self._at + size} are not in memory")
