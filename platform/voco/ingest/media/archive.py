"""Media in zip archives, local or in S3, read without unpacking: the index once, then each member by its name.

The job's media are one archive, or a folder that has files, archives or both.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import zlib
from contextlib import suppress
from itertools import islice
from typing import Protocol

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from voco.errors import JobFailed, Refused, one_line
from voco.ingest.media import zip_index
from voco.ingest.media.folder import ARCHIVE, FolderListing, MediaRoot, path_inside
from voco.ingest.media.source import OpenedMedia, TooLarge, check_size
from voco.ingest.media.span import Range, Span, joined
from voco.ingest.media.zip_index import ZipIndex
from voco.ingest.source_row import BadRow, DamagedArchive
from voco.store import storage

IMAGES = (".jpg", ".png", ".gif", ".jpeg")  # tried in this order for an image that is missing under its own name
WEBVID_CLIP = re.compile(r"(.*/|)\d{6}_\d{6}/([^/]+)")  # `<page_dir>/<videoid>.mp4`; a video id is unique in the set
STORED, DEFLATED = 0, 8  # the only methods of image sets; their decompression can be bounded

HEADER_BYTES = 30  # of a local header, before the name
EXTRA_BYTES = 256  # after the name, read together with it: times and owners take less


def is_archive(uri: str) -> bool:
    """True for media that are one zip file, by its name."""
    return uri.lower().endswith(ARCHIVE)


def open_media(uri: str) -> OpenedMedia:
    """The media at a resolved URI. Raises Refused for an archive that cannot be read."""
    return AnyName(_archive(uri) if is_archive(uri) else MediaFolder(uri))


def check_media(uri: str | None) -> None:
    """Check the archive in the driver, before any work. Raises Refused when it cannot be read."""
    if uri is not None and is_archive(uri):
        _archive(uri).close()


def _archive(uri: str) -> ZipArchive:
    try:
        return ZipArchive(uri)
    except JobFailed:  # the storage does not answer: the archive may be good
        raise
    except (DamagedArchive, OSError) as error:
        raise Refused(f"inputs.media: {uri}: expected a zip archive that can be read: {one_line(error)}") from error


class AnyName:
    """Media that may lie under another name than the rows say: LLaVA calls all OCR-VQA images .jpg, but some are not, and
    WebVid's clips may lie in one flat folder instead of that of their page.

    The sample keeps the row's name, so renaming or moving the files changes nothing. The format is recognised by content.
    """

    def __init__(self, source: OpenedMedia) -> None:
        self.source = source
        self.concurrent = source.concurrent

    def expect(self, paths: list[str]) -> None:
        self.source.expect(paths)

    def read(self, path: str, limit: int) -> bytes:
        """The bytes at the path, else of the first of `other_names` that exists. Raises what the source raises."""
        try:
            return self.source.read(path, limit)
        except BadRow as bad:
            if bad.reason != "missing_media":
                raise
            missing = bad
        for name in other_names(path):
            try:
                return self.source.read(name, limit)
            except BadRow as bad:
                if bad.reason != "missing_media":
                    raise
        raise missing


def other_names(path: str) -> list[str]:
    """Where a missing medium may lie: an image with the other extensions of its kind, WebVid's clip without its page's folder."""
    stem, dot, extension = path.rpartition(".")
    if dot + extension.lower() in IMAGES:
        return [stem + suffix for suffix in IMAGES if suffix != dot + extension]
    clip = WEBVID_CLIP.fullmatch(path)
    return [clip[1] + clip[2]] if clip else []


class MediaFolder:
    """A folder of media in which zip archives may replace unpacked folders: `coco/train2017.zip` for `coco/train2017/1.jpg`.

    A file itself comes first, then the archives in the folders above its own, nearest folder first and by name within a folder;
    for a file in the root, the archives in the root. Folders are listed once, when a first file is missing; after that no
    request goes to folders that do not exist. In S3 several threads may read: the first read in a folder is alone, because it
    shows whether the folder exists.
    """

    def __init__(self, uri: str) -> None:
        self.root = MediaRoot(uri)
        self.concurrent = self.root.real is None
        self.listed: dict[str, FolderListing] = {}
        self.opened: dict[str, ZipArchive | str] = {}  # str: why the archive cannot be read
        self.lock = threading.RLock()  # of the two above, and of the two below
        self.visited: set[str] = set()  # folders in which a read has ended
        self.expected: list[str] = []
        self.first_reads: dict[str, threading.Lock] = {}  # of every folder in which a read has begun

    def expect(self, paths: list[str]) -> None:
        with self.lock:
            self.expected = paths
            for name, archive in self.opened.items():
                self._announce(name, archive)

    def _announce(self, name: str, archive: ZipArchive | str) -> None:
        """Give an archive the expected paths that may be its members."""
        if not isinstance(archive, str):
            folder = name[: name.rfind("/") + 1]
            archive.expect([path.removeprefix(folder) for path in self.expected if path.startswith(folder)])

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of the file or member at a normalised path (`source_row.normal_path`).

        Raises BadRow: those of `MediaRoot.read` and of `ZipArchive.read`. An archive that cannot be read counts as empty; the
        detail of missing_media names its fault.
        """
        folder = path.rpartition("/")[0]
        if not self.concurrent or folder in self.visited:
            return self._read(path, limit)
        with self.lock:
            first_read = self.first_reads.setdefault(folder, threading.Lock())
        with first_read:
            if folder not in self.visited:
                try:
                    data = self._read(path, limit)
                except BadRow:
                    self.visited.add(folder)
                    raise
                self.visited.add(folder)
                return data
        return self._read(path, limit)

    def _read(self, path: str, limit: int) -> bytes:
        missing = BadRow("missing_media", f"{path}: no such folder")
        if not self._absent(path):
            try:
                return self.root.read(path, limit)
            except BadRow as bad:
                if bad.reason != "missing_media":
                    raise
                missing = bad
        tried = [missing.detail]
        for name, member in self._archives(path):
            archive = self._open(name)
            if isinstance(archive, str):
                tried.append(f"{name}, which cannot be read ({archive})")
                continue
            try:
                return archive.read(member, limit)
            except TooLarge as bad:
                raise TooLarge(f"{path}: {bad.path}", bad.size, limit) from bad
            except BadRow as bad:
                if bad.reason != "missing_media":
                    raise BadRow(bad.reason, f"{path}: {bad.detail}") from bad
                tried.append(name)
        raise BadRow("missing_media", ", nor in ".join(tried))

    def _absent(self, path: str) -> bool:
        """True when a folder of the path is known to be missing."""
        folder = ""
        for name in path.split("/")[:-1]:
            listing = self.listed.get(folder)
            if listing is None or name not in listing.folders:
                return listing is not None
            folder = f"{folder}/{name}".lstrip("/")
        return False

    def _archives(self, path: str) -> list[tuple[str, str]]:
        """The archives that may contain the file, by their paths, each with the member's path."""
        levels: list[list[tuple[str, str]]] = []
        folder, member = "", path
        while True:  # from the root down, as far as the folders exist
            listing = self._listing(folder)
            levels.append([(f"{folder}/{archive}".lstrip("/"), member) for archive in listing.archives])
            name, _, member = member.partition("/")
            if name not in listing.folders or "/" not in member:
                return [candidate for level in reversed(levels) for candidate in level]
            folder = f"{folder}/{name}".lstrip("/")

    def _listing(self, folder: str) -> FolderListing:
        with self.lock:
            if folder not in self.listed:
                self.listed[folder] = self.root.listing(folder)
            return self.listed[folder]

    def _open(self, name: str) -> ZipArchive | str:
        """The archive, or why it cannot be read."""
        with self.lock:
            if name not in self.opened:
                try:
                    if self.root.real is not None:
                        path_inside(self.root.real, name)
                    self.opened[name] = ZipArchive(storage.join(self.root.uri, name))
                    self._announce(name, self.opened[name])
                except BadRow as bad:
                    self.opened[name] = bad.detail
                except (DamagedArchive, PermissionError) as error:
                    self.opened[name] = one_line(error)
            return self.opened[name]


class ZipArchive:
    """The members of a zip file; media paths are relative to its root. A folder of the archive's own name is optional: in
    images.zip, the path `images/1.jpg` also finds the member `1.jpg`, and `1.jpg` also finds `images/1.jpg`.

    Raises DamagedArchive for a file that is no archive or has a damaged central directory, OSError for an unreadable file.
    """

    def __init__(self, uri: str) -> None:
        self.name = uri.rsplit("/", 1)[-1]
        self.folder = f"{self.name[: -len(ARCHIVE)]}/"
        self.file = _open(uri)
        self.concurrent = isinstance(self.file, _StoredFile)
        self.spans: dict[str, Span] = {}  # by the path of an expected member, until it is read
        try:
            self.members = ZipIndex(self.file.read_at, self.file.size)
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        self.file.close()

    def expect(self, paths: list[str]) -> None:
        """Name the members that will be read next, in order. In S3, those that lie close together are read by one request."""
        self.spans = {}
        if not self.concurrent:
            return
        members: list[tuple[str, Range]] = []
        for path in paths:
            with suppress(BadRow):  # not here
                members.append((path, _block(*self._find(path))))
        named = iter(members)
        for _, run in joined((self.name, *block) for _, block in members):
            if len(run) > 1:
                span = Span(self.file.read_at, run)
                self.spans |= {path: span for path, _ in islice(named, len(run))}
            else:
                next(named)

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of the member at a normalised path (`source_row.normal_path`).

        Raises BadRow: missing_media (no such member, or a folder), unsafe_path (a symbolic link), unsupported_format
        (encrypted, or a method other than stored and deflated), media_too_large (more than `limit` bytes by the index),
        corrupt_media (a damaged header, a wrong size or checksum), download_failed (S3 denies access).
        """
        span = self.spans.pop(path, None)
        name, member = self._find(path)
        if member["kind"] == zip_index.LINK:
            raise BadRow("unsafe_path", f"{path}: a symbolic link in {self.name}")
        if member["kind"] == zip_index.ENCRYPTED:
            raise BadRow("unsupported_format", f"{path}: encrypted in {self.name}")
        if member["method"] not in (STORED, DEFLATED):
            raise BadRow("unsupported_format", f"{path}: compression method {member['method']} in {self.name}")
        check_size(path, int(member["size"]), limit)
        try:
            return self._unpack(name, member, self.file.read_at if span is None else span.read)
        except (DamagedArchive, zlib.error) as error:
            raise BadRow("corrupt_media", f"{path}: {one_line(error)} in {self.name}") from error
        except PermissionError as error:
            raise BadRow("download_failed", f"{path}: {one_line(error)}") from error
        except OSError as error:
            if error.errno == errno.EIO and isinstance(self.file, _LocalFile):  # the disk cannot read it
                raise BadRow("corrupt_media", f"{path}: {one_line(error)}") from error
            raise

    def _find(self, path: str) -> tuple[bytes, np.void]:
        """The member and its name as spelled in the archive."""
        other = path.removeprefix(self.folder) if path.startswith(self.folder) else self.folder + path
        for spelled in (path, other):
            # UTF-8, with or without its flag, and DOS's code page
            for name in (spelled.encode(), spelled.encode("cp437", "replace"))[: 1 if spelled.isascii() else 2]:
                member = self.members.find(name)
                if member is not None:
                    return name, member
        folder = self.members.find(f"{path}/".encode()) is not None
        raise BadRow("missing_media", f"{path}: {'a folder of' if folder else 'not in'} {self.name}")

    def _unpack(self, name: bytes, member: np.void, read_at: zip_index.ReadAt) -> bytes:
        offset, packed, size = int(member["offset"]), int(member["packed"]), int(member["size"])
        if packed > 2 * size + 1024:  # no compressor does that; this also bounds the bytes that are read
            raise DamagedArchive(f"{packed} bytes that unpack to {size}")
        block = read_at(*_block(name, member))
        length, extra = int.from_bytes(block[26:28], "little"), int.from_bytes(block[28:30], "little")
        start = HEADER_BYTES + length + extra
        if block[:4] != zip_index.LOCAL_MARK.to_bytes(4, "little") or block[HEADER_BYTES : HEADER_BYTES + length] != name:
            raise DamagedArchive("no local header with its name")
        if extra > EXTRA_BYTES:
            block, start = self.file.read_at(offset + start, packed), 0
        data = block[start : start + packed]
        if len(data) < packed:
            raise DamagedArchive(f"{len(data)} of {packed} bytes")
        if member["method"] == DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data = inflate.decompress(data, size + 1)
            if not inflate.eof:
                raise DamagedArchive(f"more or fewer bytes than {size}")
        if len(data) != size:
            raise DamagedArchive(f"{len(data)} bytes for {size}")
        if zlib.crc32(data) != member["crc"]:
            raise DamagedArchive("a wrong checksum")
        return data


def _block(name: bytes, member: np.void) -> Range:
    """First byte and size of what is read of a member: its local header and its bytes."""
    return int(member["offset"]), HEADER_BYTES + len(name) + EXTRA_BYTES + int(member["packed"])


class _File(Protocol):
    size: int

    def read_at(self, start: int, size: int) -> bytes:
        """Bytes from `start` on: `size`, or fewer at the end of the file."""

    def close(self) -> None: ...


class _LocalFile:
    def __init__(self, path: str) -> None:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self.size = os.fstat(self.file.fileno()).st_size

    def read_at(self, start: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), max(0, min(size, self.size - start)), start) if start < self.size else b""

    def close(self) -> None:
        self.file.close()


class _StoredFile:
    """A file in S3: each read is one request."""

    def __init__(self, uri: str) -> None:
        self.fs, self.path = storage.filesystem(uri)
        self.size = int(self.fs.info(self.path)["size"])

    def read_at(self, start: int, size: int) -> bytes:
        end = min(start + size, self.size)
        return bytes(self.fs.cat_file(self.path, start=start, end=end)) if start < end else b""

    def close(self) -> None:
        pass


def _open(uri: str) -> _File:
    fs, path = storage.filesystem(uri)
    return _LocalFile(path) if isinstance(fs, LocalFileSystem) else _StoredFile(uri)
