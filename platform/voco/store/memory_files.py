"""Writes large files that lie in memory, without a copy on disk."""

from __future__ import annotations

import hashlib
from threading import Thread

from fsspec.implementations.local import LocalFileSystem

from voco.store import storage


def write_view(uri: str, data: memoryview) -> str:
    """Write bytes that lie in memory, however many, atomically; returns their sha256, which is computed meanwhile.

    On S3 they go straight from memory in parts, without the temporary file of `open_write`.
    """
    fs, path = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with storage.open_write(uri) as file:
            file.write(data)
        return file.sha256()
    from voco.store.s3 import part_bytes

    digest = hashlib.sha256()
    beside = Thread(target=digest.update, args=(data,))
    beside.start()
    try:
        fs.pipe_file(path, _Slices(data), chunksize=part_bytes(len(data)))
    finally:
        beside.join()
    return digest.hexdigest()


class _Slices:
    """Bytes in memory of which a client of S3 copies a part when it sends it: it takes no memoryview."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._view[part])
