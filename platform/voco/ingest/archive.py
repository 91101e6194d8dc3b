"""Media in a zip archive, read in place: the central directory once, then each member by its name. Local or S3."""

from __future__ import annotations

import errno
import os
import stat
import struct
import zipfile
import zlib
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from voco import storage
from voco.errors import Refused
from voco.ingest.items import BadRow
from voco.ingest.media import MediaRoot, MediaSource, check_size

# The two methods whose decompression zipfile bounds; bz2 and lzma would unpack a bomb whole before its size is known.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}

# What zipfile raises on damage: it parses with struct, zlib and seeks to wherever a header says.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, OverflowError)

# S3 is asked for this much more than zipfile reads: a member's header and a typical web image in one request.
READ_AHEAD = 64 << 10


def is_archive(uri: str) -> bool:
    """True for media that are one zip file, known by its name."""
    return uri.lower().endswith(".zip")


def open_media(uri: str) -> MediaSource:
    """The folder or the archive at a resolved URI. Raises Refused for an archive that cannot be read."""
    return ZipArchive(uri) if is_archive(uri) else MediaRoot(uri)


def check_media(uri: str | None) -> None:
    """Refuse an archive that cannot be read, in the driver, before any work."""
    if uri is not None and is_archive(uri):
        ZipArchive(uri).close()


class ZipArchive:
    """The members of a zip file; media paths are relative to its root."""

    def __init__(self, uri: str) -> None:
        try:
            self.handle = _open(uri)
            self.zip = zipfile.ZipFile(self.handle)
        except (*DAMAGE, OSError, NotImplementedError) as error:
            raise Refused(f"inputs.media: {uri}: expected a zip archive that can be read: {_line(error)}") from error

    def close(self) -> None:
        self.zip.close()
        self.handle.close()

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of the member at a normalised path (`items.normal_path`).

        Raises BadRow: missing_media (no such member, or a folder), unsafe_path (a symbolic link), unsupported_format
        (encrypted, or a method other than stored and deflated), media_too_large (says or unpacks to more than `limit`
        bytes), corrupt_media (a damaged header, a wrong checksum), download_failed (S3 refuses).
        """
        member = self.zip.NameToInfo.get(path)
        if member is None:
            what = "a folder of the archive" if f"{path}/" in self.zip.NameToInfo else "not in the archive"
            raise BadRow("missing_media", f"{path}: {what}")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise BadRow("unsafe_path", f"{path}: a symbolic link in the archive")
        if member.flag_bits & 0x1:
            raise BadRow("unsupported_format", f"{path}: encrypted in the archive")
        if member.compress_type not in METHODS:
            raise BadRow("unsupported_format", f"{path}: compression method {member.compress_type} in the archive")
        check_size(path, member.file_size, limit)
        return self._unpack(path, member, limit)

    def _unpack(self, path: str, member: zipfile.ZipInfo, limit: int) -> bytes:
        try:
            with self.zip.open(member) as packed:
                data = packed.read(limit + 1)  # never more, whatever the header says
        except NotImplementedError as error:
            raise BadRow("unsupported_format", f"{path}: {_line(error)}") from error
        except DAMAGE as error:
            raise BadRow("corrupt_media", f"{path}: {_line(error)}") from error
        except PermissionError as error:
            raise BadRow("download_failed", f"{path}: {_line(error)}") from error
        except OSError as error:
            if error.errno in (errno.EIO, errno.EINVAL):  # the disk cannot read it; a header points before the start
                raise BadRow("corrupt_media", f"{path}: {_line(error)}") from error
            raise
        check_size(path, len(data), limit)
        if len(data) != member.file_size:
            raise BadRow("corrupt_media", f"{path}: {len(data)} bytes, the archive says {member.file_size}")
        return data


def _open(uri: str) -> IO[bytes]:
    fs, path = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return storage.open_read(uri)
    handle: IO[bytes] = fs.open(path, "rb", block_size=READ_AHEAD, cache_type="readahead")
    return handle


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
