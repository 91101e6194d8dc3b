"""The first row of each key, in order and in flat memory: the rows wait on disk until all keys were seen."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from voco.store import parquet

BATCH_ROWS = 1 << 15  # in memory at a time
BUCKETS = 64  # files of keys; one of them is in memory at a time
KEY = np.dtype([("digest", "V16"), ("row", "<i8")])


def distinct_rows(rows: Iterable[dict[str, Any]], key: str, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """The columns `schema` of every row whose string `key` no earlier row has, in order.

    Keys are compared by 128 bits of a hash. Memory: two batches, a bucket of keys, and a byte a row; on disk, in files without
    a name that end with the process, 24 bytes a row and the rows themselves, compressed.
    """
    with ExitStack() as stack:
        spool = stack.enter_context(tempfile.TemporaryFile())
        buckets = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(BUCKETS)]
        total = _spool(rows, key, schema, spool, buckets)
        is_first = np.zeros(total, dtype=bool)
        for bucket in buckets:
            is_first[_first_rows(bucket)] = True
        spool.seek(0)
        start = 0
        for batch in pa.ipc.open_stream(spool):
            yield from batch.filter(pa.array(is_first[start : start + batch.num_rows])).to_pylist()
            start += batch.num_rows


def _spool(rows: Iterable[dict[str, Any]], key: str, schema: pa.Schema, spool: IO[bytes], buckets: Sequence[IO[bytes]]) -> int:
    """Write the rows to `spool`, and each key with its row's number to its bucket. Returns the number of rows."""
    remaining = iter(rows)
    total = 0
    with pa.ipc.new_stream(spool, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        while batch := list(itertools.islice(remaining, BATCH_ROWS)):
            stream.write_table(parquet.to_table(batch, schema))
            keys = np.empty(len(batch), KEY)
            digests = b"".join(blake2b(row[key].encode(), digest_size=16).digest() for row in batch)
            keys["digest"] = np.frombuffer(digests, "V16")
            keys["row"] = np.arange(total, total + len(batch))
            numbers = np.frombuffer(digests, np.uint8)[::16] % len(buckets)
            for number, bucket in enumerate(buckets):
                bucket.write(keys[numbers == number].tobytes())
            total += len(batch)
    return total


def _first_rows(bucket: IO[bytes]) -> npt.NDArray[np.int64]:
    """The rows of a bucket that are the first of their key. The bucket has its rows in ascending order."""
    bucket.seek(0)
    keys = np.frombuffer(bucket.read(), KEY)
    halves = np.ascontiguousarray(keys["digest"]).view("<u8").reshape(-1, 2)
    order = np.lexsort((keys["row"], halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    rows: npt.NDArray[np.int64] = keys["row"][order[is_first]]
    return rows
