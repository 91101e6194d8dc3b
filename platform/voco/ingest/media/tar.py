"""Tar shards, local or in S3: their members in order without unpacking, and the bytes of one member by its location.

Headers are not trusted: a name is never used as a file name, sizes are checked against the shard's own, and a damaged header or
extended header ends the shard with DamagedArchive, so that no member is lost silently.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from voco.errors import Refused
from voco.ingest.media.block_reader import BlockReader
from voco.ingest.media.source import MediaSource, check_size
from voco.ingest.media.span import RUN_BYTES, Span, joined
from voco.ingest.source_row import BadRow, DamagedArchive
from voco.store import storage

SHARD = ".tar"
BLOCK = 512  # bytes; headers and contents fill complete blocks
EXTENDED_BYTES = 1 << 20  # most bytes of an extended header; a real one holds a name


@dataclass(frozen=True)
class Member:
    """One entry of a shard, other than a folder."""

    name: str
    regular: bool  # not a link or a device
    start: int  # of its bytes in the shard
    size: int
    cut: bool  # the shard ends before the member does


def shard_uris(uri: str) -> list[str]:
    """The shard itself, or every .tar directly in the folder, by name. Raises Refused when there is none."""
    shards = [uri] if uri.endswith(SHARD) else [storage.join(uri, shard["name"]) for shard in storage.list_shards(uri, (SHARD,))]
    if not shards:
        raise Refused(f"inputs.annotations: {uri}: expected a .tar file or a folder with .tar files in it")
    return shards


def open_shard(uri: str) -> IO[bytes]:
    """A shard for reading from start to end."""
    fs, path = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return storage.open_read(uri)
    return io.BufferedReader(BlockReader(fs, path), BLOCK)


def iterate_members(handle: IO[bytes]) -> Iterator[Member]:
    """Every member except folders, in order. The caller may read from the handle between two members.

    A member that is cut off is the last. Raises DamagedArchive for a damaged header and for a missing end mark.
    """
    total = handle.seek(0, os.SEEK_END)
    at = 0
    name: str | None = None
    size: int | None = None
    while True:
        handle.seek(at)
        block = handle.read(BLOCK)
        if len(block) < BLOCK:
            raise DamagedArchive(f"the shard ends at byte {total} without an end mark")
        if not block.strip(b"\0"):
            return
        try:
            head = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise DamagedArchive(f"damaged header at byte {at}: {error}") from error
        start = at + BLOCK
        length = head.size if size is None or head.type in EXTENDED else size
        if length < 0:
            raise DamagedArchive(f"damaged header at byte {at}: a size of {length}")
        at = start + -(-length // BLOCK) * BLOCK
        if head.type in EXTENDED:
            extended = _extended(handle, start, length, total)
            if head.type == tarfile.GNUTYPE_LONGNAME:
                name = extended.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif head.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                name, size = _records(extended, name, size)
            continue
        if not head.isdir():
            yield Member(name or head.name, head.type in REGULAR, start, length, start + length > total)
            if start + length > total:
                return
        name = size = None


EXTENDED = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}  # not a sparse file, whose bytes are not contiguous


def _extended(handle: IO[bytes], start: int, size: int, total: int) -> bytes:
    if size > EXTENDED_BYTES or start + size > total:
        raise DamagedArchive(f"extended header of {size} bytes at byte {start - BLOCK}")
    return handle.read(size)


def _records(data: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size from POSIX pax records: `<length> <key>=<value>\\n`, the length of the complete record."""
    at = 0
    try:
        while at < len(data) and data[at : at + 1] != b"\0":
            digits = data[at : data.index(b" ", at)]
            end = at + int(digits)
            key, _, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
            if end <= at + len(digits) + 1 or end > len(data) or data[end - 1 : end] != b"\n":
                raise ValueError("a record of a wrong length")
            if key == b"path":
                name = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                size = int(value)
            at = end
    except ValueError as error:
        raise DamagedArchive(f"damaged extended header: {error}") from error
    return name, size


def member_location(shard: str, member: Member) -> str:
    """The location of a member's bytes in the work list, `00012.tar:1536:20480`: shard, first byte and size."""
    return f"{shard.rsplit('/', 1)[-1]}:{member.start}:{member.size}"


class TarShards:
    """The members of a folder's shards, or of one shard, by their locations."""

    def __init__(self, uri: str) -> None:
        self.folder = uri.rsplit("/", 1)[0] if uri.endswith(SHARD) else uri
        self.fs, self.root = storage.filesystem(self.folder)
        self.concurrent = not isinstance(self.fs, LocalFileSystem)

    def sources(self, locations: list[str]) -> Iterator[MediaSource]:
        """The source of each location, in order. In S3, members that lie close together are read by one request."""
        parsed = (location.rsplit(":", 2) for location in locations)
        members = ((name, int(start), int(size)) for name, start, size in parsed)
        for name, run in joined(members, RUN_BYTES if self.concurrent else 0):
            span = Span(partial(storage.read_range, self.fs, f"{self.root}/{name}"), run)
            for start, size in run:
                yield _TarMember(span, name, start, size)


@dataclass(frozen=True)
class _TarMember:
    span: Span
    name: str
    start: int
    size: int

    def read(self, path: str, limit: int) -> bytes:
        """The member's bytes. Raises BadRow: media_too_large, corrupt_media (truncated), missing_media, download_failed."""
        check_size(path, self.size, limit)
        try:
            data = self.span.read(self.start, self.size)
        except FileNotFoundError as error:
            raise BadRow("missing_media", f"{path}: {self.name} is gone") from error
        except PermissionError as error:
            raise BadRow("download_failed", f"{path}: {self.name}: {error}") from error
        if len(data) != self.size:
            raise BadRow("corrupt_media", f"{path}: {len(data)} bytes in {self.name}, its header says {self.size}")
        return data
