"""The folder that media paths are relative to, on disk or in S3: reads files without leaving it and lists its folders."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from voco.ingest.media.source import TooLarge, check_size
from voco.ingest.source_row import BadRow
from voco.store import storage

ARCHIVE = ".zip"

FOLDERS_KEPT = 4096  # checked folders that are remembered
KEY_BYTES = 1024  # most bytes of a key in S3; a longer one makes a bad request

# The system's errors for a path without a file. Any other error is a fault of the machine and stops the job.
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP}


@dataclass(frozen=True)
class FolderListing:
    """The direct contents of a folder, without its files: there may be a million."""

    folders: frozenset[str]
    archives: tuple[str, ...]  # sorted


class MediaRoot:
    """The files of a media folder by their paths."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.fs, self.root = storage.filesystem(uri)
        self.real = Path(os.path.realpath(self.root)) if isinstance(self.fs, LocalFileSystem) else None

    def read(self, path: str, limit: int) -> bytes:
        """The bytes at a normalised path (`source_row.normal_path`).

        In S3 one request, whose answer states the size before the bytes. Raises BadRow: missing_media, unsafe_path (a link leads
        out of the root), media_too_large (TooLarge), download_failed (S3 denies access), corrupt_media (the disk cannot read it).
        """
        if self.real is not None:
            return _read_local(self.real, path, limit)
        key = f"{self.root}/{path}"
        if len(key.encode()) > KEY_BYTES:
            raise BadRow("missing_media", f"{path[:200]}: longer than a key in S3 may be")
        from voco.store.s3 import ObjectTooLarge  # an import of half a second, which local files do not need

        try:
            return bytes(self.fs.read_object(key, limit))
        except ObjectTooLarge as error:
            raise TooLarge(path, error.size, limit) from error
        except FileNotFoundError as error:
            raise BadRow("missing_media", f"{path}: {os.strerror(errno.ENOENT)}") from error
        except PermissionError as error:
            raise BadRow("download_failed", f"{path}: {error}") from error

    def listing(self, folder: str) -> FolderListing:
        """The contents of a folder, "" for the root; empty for a folder that is missing or a link out of the root.

        In S3 one request for each thousand names. Raises BadRow(download_failed) where S3 denies access.
        """
        if self.real is not None:
            return _local_listing(self.real, folder)
        try:
            return self._stored_listing(folder)
        except PermissionError as error:
            raise BadRow("download_failed", f"{folder or self.uri}: the folder cannot be listed: {error}") from error

    def _stored_listing(self, folder: str) -> FolderListing:
        bucket, key, _ = self.fs.split_path(f"{self.root}/{folder}".rstrip("/"))
        start = f"{key}/" if key else ""
        folders: set[str] = set()
        archives: list[str] = []
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": start, "Delimiter": "/"}
        while True:  # not fs.ls, which would cache a million names
            page = self.fs.call_s3("list_objects_v2", **request)
            folders |= {entry["Prefix"].removeprefix(start).rstrip("/") for entry in page.get("CommonPrefixes", ())}
            names = (entry["Key"].removeprefix(start) for entry in page.get("Contents", ()))
            archives += [name for name in names if name.lower().endswith(ARCHIVE)]
            if not page.get("IsTruncated"):
                return FolderListing(frozenset(folders), tuple(sorted(archives)))
            request["ContinuationToken"] = page["NextContinuationToken"]


def path_inside(root: Path, path: str) -> Path:
    """The file or folder that a path below the root leads to. Raises BadRow(unsafe_path), OSError."""
    real = Path(os.path.realpath(root / path, strict=True))
    if root != real and root not in real.parents:
        raise BadRow("unsafe_path", f"{path}: a link leads out of the media folder")
    return real


def _open(root: Path, path: str) -> int:
    """A descriptor of the file at a path. The check that no link leads out runs once for each folder."""
    folder, _, name = path.rpartition("/")
    try:
        return os.open(f"{_folder(root, folder)}/{name}", FLAGS | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    return os.open(path_inside(root, path), FLAGS)  # a link, which may stay inside


FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # without the last, opening a pipe would wait
_folder = lru_cache(FOLDERS_KEPT)(path_inside)


def _read_local(root: Path, path: str, limit: int) -> bytes:
    try:
        descriptor = _open(root, path)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe, which would never end
                raise BadRow("missing_media", f"{path}: not a regular file")
            check_size(path, status.st_size, limit)
            return _read_all(descriptor, status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in ABSENT:
            raise BadRow("missing_media", f"{path}: {error.strerror}") from error
        if error.errno == errno.EIO:
            raise BadRow("corrupt_media", f"{path}: {error.strerror}") from error
        raise


def _read_all(descriptor: int, size: int) -> bytes:
    data = os.read(descriptor, size)
    while len(data) < size and (piece := os.read(descriptor, size - len(data))):  # one read returns at most 2 GiB
        data += piece
    return data


def _local_listing(root: Path, folder: str) -> FolderListing:
    try:
        entries = os.scandir(path_inside(root, folder))
    except BadRow:
        return FolderListing(frozenset(), ())
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return FolderListing(frozenset(), ())
    folders: set[str] = set()
    archives: list[str] = []
    with entries:
        for entry in entries:
            with suppress(OSError):  # a link to itself is neither a folder nor a file
                if entry.is_dir():
                    folders.add(entry.name)
                elif entry.name.lower().endswith(ARCHIVE) and entry.is_file():
                    archives.append(entry.name)
    return FolderListing(frozenset(folders), tuple(sorted(archives)))
