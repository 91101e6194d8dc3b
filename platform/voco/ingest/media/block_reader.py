"""A file in S3 that is read mostly from start to end, as a tar shard is for its headers: the next blocks are read meanwhile."""

from __future__ import annotations

import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fsspec import AbstractFileSystem

BLOCK_BYTES = 1 << 20
MOST_AHEAD = 16  # blocks that are read at once, all in memory


class BlockReader(io.RawIOBase):
    """Reads blocks once. Each step to the next block doubles the number that are read ahead; a jump elsewhere ends reading ahead.

    Raises what s3fs raises, FileNotFoundError when it is opened. `close` ends every thread.
    """

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self.fs, self.path = fs, path
        self.size = int(fs.info(path)["size"])
        self.at = 0
        self.last = -1  # block of the last read
        self.ahead = 0
        self.blocks: dict[int, Future[bytes]] = {}
        self.pool = ThreadPoolExecutor(MOST_AHEAD, thread_name_prefix="blocks")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Bytes up to the end of a block: `io.BufferedReader` asks again for the rest."""
        if self.at >= self.size:
            return 0
        block, first = divmod(self.at, BLOCK_BYTES)
        data = self._block(block)[first : first + len(buffer)]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.blocks = {}
        super().close()

    def _block(self, block: int) -> bytes:
        if block != self.last:
            self.ahead = min(MOST_AHEAD - 1, 2 * self.ahead + 1) if block == self.last + 1 else 0
            self.last = block
            wanted = range(block, min(block + 1 + self.ahead, -(-self.size // BLOCK_BYTES)))
            for other in [other for other in self.blocks if other not in wanted]:
                self.blocks.pop(other).cancel()
            for other in wanted:
                if other not in self.blocks:
                    self.blocks[other] = self.pool.submit(self._read, other)
        return self.blocks[block].result()

    def _read(self, block: int) -> bytes:
        start = block * BLOCK_BYTES
        return bytes(self.fs.cat_file(self.path, start=start, end=min(start + BLOCK_BYTES, self.size)))
