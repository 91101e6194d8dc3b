"""Media in zip archives, read in place: where the members are once, then each by its name. Local or S3.

The job's media are one archive, or a folder in which archives may lie beside files, or instead of them.
"""

from __future__ import annotations

import errno
import os
import zlib
from typing import Protocol

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from voco.errors import JobFailed, Refused, one_line
from voco.ingest.media import zip_index
from voco.ingest.media.folder import ARCHIVE, FolderListing, MediaRoot, path_inside
from voco.ingest.media.image import MediaSource, check_size
from voco.ingest.media.zip_index import ZipIndex
from voco.ingest.source_row import BadRow, DamagedArchive
from voco.store import storage

IMAGES = (".jpg", ".png", ".gif", ".jpeg")  # tried in this order for an image that is not there under its own name
STORED, DEFLATED = 0, 8  # the methods whose decompression zlib bounds, and the only ones that image sets have

HEADER = 30  # bytes of a local header before the name
EXTRA = 256  # bytes behind the name that are read with it: times and owners take less


def is_archive(uri: str) -> bool:
    """True for media that are one zip file, known by its name."""
    return uri.lower().endswith(ARCHIVE)


def open_media(uri: str) -> MediaSource:
    """The media at a resolved URI. Raises Refused for an archive that cannot be read."""
    return AnyImageName(_archive(uri) if is_archive(uri) else MediaFolder(uri))


def check_media(uri: str | None) -> None:
    """Refuse an archive that cannot be read, in the driver, before any work."""
    if uri is not None and is_archive(uri):
        _archive(uri).close()


def _archive(uri: str) -> ZipArchive:
    try:
        return ZipArchive(uri)
    except JobFailed:  # a storage that does not answer says nothing about the archive
        raise
    except (DamagedArchive, OSError) as error:
        raise Refused(f"inputs.media: {uri}: expected a zip archive that can be read: {one_line(error)}") from error


class AnyImageName:
    """Media whose images may have another extension than the rows say, as OCR-VQA's: all are .jpg to LLaVA, not on the web.

    The sample keeps the name that the row has, so it is the same one as after renaming every file, as LLaVA's guide does;
    its format is known by its content.
    """

    def __init__(self, source: MediaSource) -> None:
        self.source = source

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of the file at the path, else of the first that differs in its extension only. Raises as the source does."""
        stem, dot, extension = path.rpartition(".")
        try:
            return self.source.read(path, limit)
        except BadRow as bad:
            if bad.reason != "missing_media" or dot + extension.lower() not in IMAGES:
                raise
            missing = bad
        for other in IMAGES:
            if other != dot + extension:
                try:
                    return self.source.read(stem + other, limit)
                except BadRow as bad:
                    if bad.reason != "missing_media":
                        raise
        raise missing


class MediaFolder:
    """A folder of media in which zip archives may hold what is not unpacked: `coco/train2017.zip` for `coco/train2017/1.jpg`.

    The file itself comes first, then the archives in the folders above the file's own, the nearest folder first, in each by
    name; for a file in the root, those in the root. Folders are listed when a first file is missing, and once: from then
    on nothing is asked for in folders that are not there.
    """

    def __init__(self, uri: str) -> None:
        self.root = MediaRoot(uri)
        self.listed: dict[str, FolderListing] = {}
        self.opened: dict[str, ZipArchive | str] = {}  # or why it cannot be read

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of the file or member at a normalised path (`items.normal_path`).

        Raises BadRow: those of `MediaRoot.read` and of `ZipArchive.read`. An archive that cannot be read has nothing: a row
        that no other has lacks its media, and its detail says what is wrong with this one.
        """
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
            except BadRow as bad:
                if bad.reason != "missing_media":
                    raise BadRow(bad.reason, f"{path}: {bad.detail}") from bad
                tried.append(name)
        raise BadRow("missing_media", ", nor in ".join(tried))

    def _absent(self, path: str) -> bool:
        """True where a folder above the file is known not to be there."""
        folder = ""
        for name in path.split("/")[:-1]:
            listing = self.listed.get(folder)
            if listing is None or name not in listing.folders:
                return listing is not None
            folder = f"{folder}/{name}".lstrip("/")
        return False

    def _archives(self, path: str) -> list[tuple[str, str]]:
        """Where the file may be: archives by their paths, and its path from there."""
        found: list[list[tuple[str, str]]] = []
        folder, rest = "", path
        while True:  # from the root down, no further than there are folders
            listing = self._listing(folder)
            found.append([(f"{folder}/{archive}".lstrip("/"), rest) for archive in listing.archives])
            name, _, rest = rest.partition("/")
            if name not in listing.folders or "/" not in rest:
                return [place for places in reversed(found) for place in places]
            folder = f"{folder}/{name}".lstrip("/")

    def _listing(self, folder: str) -> FolderListing:
        if folder not in self.listed:
            self.listed[folder] = self.root.listing(folder)
        return self.listed[folder]

    def _open(self, name: str) -> ZipArchive | str:
        """The archive, or what is wrong with it."""
        if name not in self.opened:
            try:
                if self.root.real is not None:
                    path_inside(self.root.real, name)
                self.opened[name] = ZipArchive(storage.join(self.root.uri, name))
            except BadRow as bad:
                self.opened[name] = bad.detail
            except (DamagedArchive, PermissionError) as error:
                self.opened[name] = one_line(error)
        return self.opened[name]


class ZipArchive:
    """The members of a zip file; media paths are relative to its root. A folder of the archive's own name may be there or not:
    `images/1.jpg` of images.zip is a member of that name or `1.jpg`, and `1.jpg` may be `images/1.jpg`.

    Raises DamagedArchive for what is no archive, or one whose central directory is, and OSError for a file that cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self.name = uri.rsplit("/", 1)[-1]
        self.folder = f"{self.name[: -len(ARCHIVE)]}/"
        self.file = _open(uri)
        try:
            self.members = ZipIndex(self.file.read_at, self.file.size)
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        self.file.close()

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of the member at a normalised path (`items.normal_path`).

        Raises BadRow: missing_media (no such member, or a folder), unsafe_path (a symbolic link), unsupported_format
        (encrypted, or a method other than stored and deflated), media_too_large (says more than `limit` bytes),
        corrupt_media (a damaged header, other bytes than it says, a wrong checksum), download_failed (S3 refuses).
        """
        name, member = self._find(path)
        if member["kind"] == zip_index.LINK:
            raise BadRow("unsafe_path", f"{path}: a symbolic link in {self.name}")
        if member["kind"] == zip_index.ENCRYPTED:
            raise BadRow("unsupported_format", f"{path}: encrypted in {self.name}")
        if member["method"] not in (STORED, DEFLATED):
            raise BadRow("unsupported_format", f"{path}: compression method {member['method']} in {self.name}")
        check_size(path, int(member["size"]), limit)
        try:
            return self._unpack(name, member)
        except (DamagedArchive, zlib.error) as error:
            raise BadRow("corrupt_media", f"{path}: {one_line(error)} in {self.name}") from error
        except PermissionError as error:
            raise BadRow("download_failed", f"{path}: {one_line(error)}") from error
        except OSError as error:
            if error.errno == errno.EIO and isinstance(self.file, _LocalFile):  # the disk cannot read it
                raise BadRow("corrupt_media", f"{path}: {one_line(error)}") from error
            raise

    def _find(self, path: str) -> tuple[bytes, np.void]:
        """A member and its name as it is spelled in the archive."""
        other = path.removeprefix(self.folder) if path.startswith(self.folder) else self.folder + path
        for spelled in (path, other):
            # UTF-8, whether it is flagged as that or not, and what DOS had
            for name in (spelled.encode(), spelled.encode("cp437", "replace"))[: 1 if spelled.isascii() else 2]:
                member = self.members.find(name)
                if member is not None:
                    return name, member
        folder = self.members.find(f"{path}/".encode()) is not None
        raise BadRow("missing_media", f"{path}: {'a folder of' if folder else 'not in'} {self.name}")

    def _unpack(self, name: bytes, member: np.void) -> bytes:
        at, packed, size = int(member["at"]), int(member["packed"]), int(member["size"])
        if packed > 2 * size + 1024:  # no compressor makes that; nor is more read, or unpacked, than the archive says
            raise DamagedArchive(f"{packed} bytes that unpack to {size}")
        held = self.file.read_at(at, HEADER + len(name) + EXTRA + packed)
        named, extra = int.from_bytes(held[26:28], "little"), int.from_bytes(held[28:30], "little")
        start = HEADER + named + extra
        if held[:4] != zip_index.LOCAL_MARK.to_bytes(4, "little") or held[HEADER : HEADER + named] != name:
            raise DamagedArchive("no header of its own")
        if extra > EXTRA:
            held, start = self.file.read_at(at + start, packed), 0
        data = held[start : start + packed]
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
    """A file in S3: one request for each read."""

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
