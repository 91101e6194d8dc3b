"""Tar shards, local or S3: their members in order without unpacking, and one member's bytes by its place.

Nothing in a header is believed: names are never file names here, sizes are held against the shard's own, and a header or
an extended header that is damaged ends the shard with `DamagedArchive`, so that no member is lost without a word.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from voco.errors import Refused
from voco.ingest.media.image import MediaSource, check_size
from voco.ingest.source_row import BadRow, DamagedArchive
from voco.store import storage

BLOCK = 512
EXTENDED_BYTES = 1 << 20  # of one extended header; real ones hold a name
READ_AHEAD = 1 << 20  # in S3


@dataclass(frozen=True)
class Member:
    """One entry of a shard that is no folder."""

    name: str
    regular: bool  # not a link or a device
    start: int  # of its bytes in the shard
    size: int
    cut: bool  # the shard ends before it does


def shard_uris(uri: str) -> list[str]:
    """The shard itself, or every .tar directly in the folder, by name. Raises Refused when there is none."""
    found = [storage.join(uri, shard["name"]) for shard in storage.list_shards(uri)] if not uri.endswith(storage.SHARD) else [uri]
    if not found:
        raise Refused(f"inputs.annotations: {uri}: expected a .tar file or a folder with .tar files in it")
    return found


def open_shard(uri: str) -> IO[bytes]:
    fs, path = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return storage.open_read(uri)
    handle: IO[bytes] = fs.open(path, "rb", block_size=READ_AHEAD, cache_type="readahead")
    return handle


def iterate_members(handle: IO[bytes]) -> Iterator[Member]:
    """Every member but folders, in order; the caller may read its bytes. Raises DamagedArchive, also for a missing end mark.

    A member that is cut is the last one that is yielded.
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
REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}  # a sparse file's bytes are not in one piece


def _extended(handle: IO[bytes], start: int, size: int, total: int) -> bytes:
    if size > EXTENDED_BYTES or start + size > total:
        raise DamagedArchive(f"extended header of {size} bytes at byte {start - BLOCK}")
    return handle.read(size)


def _records(data: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size from POSIX pax records: `<length> <key>=<value>\\n`, the length of the whole record."""
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
    """Where a member's bytes lie, as a work list says it: `00012.tar:1536:20480`, name, first byte and size."""
    return f"{shard.rsplit('/', 1)[-1]}:{member.start}:{member.size}"


class TarShards:
    """The members of the shards of a folder, each by its place; of one shard when that is what the URI names."""

    def __init__(self, uri: str) -> None:
        self.folder = uri.rsplit("/", 1)[0] if uri.endswith(storage.SHARD) else uri
        self.fs, self.root = storage.filesystem(self.folder)

    def sources(self, places: list[str]) -> Iterator[MediaSource]:
        """A source for each sample, in order."""
        for held in places:
            name, start, size = held.rsplit(":", 2)
            yield _OneMember(self, name, int(start), int(size))

    def read(self, name: str, start: int, size: int) -> bytes:
        path = f"{self.root}/{name}"
        if not isinstance(self.fs, LocalFileSystem):
            return bytes(self.fs.cat_file(path, start=start, end=start + size)) if size else b""
        with open(path, "rb") as handle:
            handle.seek(start)
            return handle.read(size)


@dataclass(frozen=True)
class _OneMember:
    shards: TarShards
    name: str
    start: int
    size: int

    def read(self, path: str, limit: int) -> bytes:
        """The member's bytes. Raises BadRow: media_too_large, corrupt_media (cut short), missing_media, download_failed."""
        check_size(path, self.size, limit)
        try:
            data = self.shards.read(self.name, self.start, self.size)
        except FileNotFoundError as error:
            raise BadRow("missing_media", f"{path}: {self.name} is gone") from error
        except PermissionError as error:
            raise BadRow("download_failed", f"{path}: {self.name}: {error}") from error
        if len(data) != self.size:
            raise BadRow("corrupt_media", f"{path}: {len(data)} bytes in {self.name}, its header says {self.size}")
        return data
