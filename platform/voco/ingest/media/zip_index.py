"""A zip's central directory as two arrays, 39 bytes a member, sorted by a hash of the name. (APPNOTE.TXT 6.3, sections 4.3, 4.4.)

zipfile keeps an object of 550 bytes for each member, and every worker opens LLaVA's seven archives of 600,000 members.
Names are not kept: the local header before a member's bytes repeats its name, and the reader compares it.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from voco.ingest.source_row import DamagedArchive

ReadAt = Callable[[int, int], bytes]  # (first byte, size): fewer bytes at the end of the file

ENTRY = np.dtype([("offset", "<u8"), ("packed", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("method", "<u2"), ("kind", "u1")])
PLAIN, LINK, ENCRYPTED = range(3)  # `kind`; `offset` is that of the local header, `packed` the compressed bytes

CENTRAL = np.dtype(
    [
        ("mark", "<u4"), ("version", "<u2"), ("needed", "<u2"), ("flags", "<u2"), ("method", "<u2"), ("time", "<u4"),
        ("crc", "<u4"), ("packed", "<u4"), ("size", "<u4"), ("name", "<u2"), ("extra", "<u2"), ("comment", "<u2"),
        ("disk", "<u2"), ("internal", "<u2"), ("attributes", "<u4"), ("offset", "<u4"),
    ]
)  # fmt: skip
LENGTHS = struct.Struct("<28xHHH")  # of the name, the extra fields and the comment that follow an entry of the directory
END = struct.Struct("<I2x2x2xHIIH")  # signature, entries, size and offset of the directory, length of the comment
END64 = struct.Struct("<I8x2x2x4x4x8xQQQ")
LOCATOR64 = struct.Struct("<I4xQ4x")  # between END64 and END
CENTRAL_MARK, LOCAL_MARK, END_MARK, END64_MARK, LOCATOR64_MARK = 0x02014B50, 0x04034B50, 0x06054B50, 0x06064B50, 0x07064B50
LONGEST_COMMENT = 0xFFFF
ZIP64, FULL = 0x0001, 0xFFFFFFFF  # the extra field with 64-bit numbers, and the 32-bit number that refers to it

PIECE = 4 << 20  # bytes of the directory that are read at a time

Piece = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]


class ZipIndex:
    """Every member of an archive of `total` bytes. Raises DamagedArchive. Takes twice its own memory while it sorts."""

    def __init__(self, read_at: ReadAt, total: int) -> None:
        start, size, shift = _directory(read_at, total)
        pieces = list(_pieces(read_at, start, size))
        names = np.concatenate([np.empty(0, np.int64), *(names for names, _ in pieces)])
        entries = np.concatenate([np.empty(0, ENTRY), *(entries for _, entries in pieces)])
        del pieces
        entries["offset"] += np.uint64(shift)
        order = np.argsort(names, kind="stable")
        self.names, self.entries = names[order], entries[order]

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: bytes) -> np.void | None:
        """The ENTRY with this name's hash. Of several entries the last, as unpacking would leave it."""
        key = hash(name)  # randomised in every process, so that no archive can be built with names that collide
        index = int(np.searchsorted(self.names, key, side="right")) - 1
        return self.entries[index] if index >= 0 and self.names[index] == key else None


def _directory(read_at: ReadAt, total: int) -> tuple[int, int, int]:
    """First byte and size of the directory, and what to add to its offsets: the bytes that were put before the archive."""
    before = END64.size + LOCATOR64.size
    tail_at = max(0, total - before - END.size - LONGEST_COMMENT)
    tail = read_at(tail_at, total - tail_at)
    record = tail.rfind(END_MARK.to_bytes(4, "little"))
    if record < 0 or record + END.size > len(tail):
        raise DamagedArchive("no end of a central directory")
    _, _, size, start, _ = END.unpack_from(tail, record)
    if tail[max(0, record - LOCATOR64.size) : record][:4] == LOCATOR64_MARK.to_bytes(4, "little"):
        record -= before
        if record < 0 or tail[record : record + 4] != END64_MARK.to_bytes(4, "little"):
            raise DamagedArchive("no end of a zip64 central directory")
        _, _, size, start = END64.unpack_from(tail, record)
    end = tail_at + record
    shift = end - size - start
    if shift < 0:
        raise DamagedArchive(f"a central directory of {size} bytes at byte {start}, which would end after byte {end}")
    return start + shift, size, shift


def _pieces(read_at: ReadAt, start: int, size: int) -> Iterator[Piece]:
    """Hashes of the names (int64) and ENTRY records, in the archive's order."""
    buffer, at, end = b"", start, start + size
    while at < end:
        piece = read_at(at, min(PIECE, end - at))
        if not piece:
            raise DamagedArchive(f"the file ends at byte {at}, in its central directory")
        buffer, at = buffer + piece, at + len(piece)
        starts, names, used = _walk(buffer)
        if starts:
            yield np.array(names, np.int64), _entries(buffer, starts, at - len(buffer))
        buffer = buffer[used:]
    if buffer:
        raise DamagedArchive("its central directory ends inside an entry")


def _walk(buffer: bytes) -> tuple[list[int], list[int], int]:
    """Offsets of the complete entries, the hashes of their names, and the end of the last entry."""
    starts, names, at = [], [], 0
    while len(buffer) - at >= CENTRAL.itemsize:
        name, extra, comment = LENGTHS.unpack_from(buffer, at)
        first = at + CENTRAL.itemsize
        end = first + name + extra + comment
        if end > len(buffer):
            break
        starts.append(at)
        names.append(hash(buffer[first : first + name]))
        at = end
    return starts, names, at


def _entries(buffer: bytes, starts: list[int], offset: int) -> np.ndarray[Any, Any]:
    """ENTRY records of the directory's entries at `starts`; `offset` is that of `buffer` in the file."""
    central = sliding_window_view(np.frombuffer(buffer, np.uint8), CENTRAL.itemsize)[starts].view(CENTRAL)[:, 0]
    wrong = np.flatnonzero(central["mark"] != CENTRAL_MARK)
    if len(wrong):
        raise DamagedArchive(f"no entry of the central directory at byte {offset + starts[wrong[0]]}")
    entries = np.empty(len(starts), ENTRY)
    for field in ("offset", "packed", "size", "crc", "method"):
        entries[field] = central[field]
    link = (central["attributes"] >> 16) & 0o170000 == stat.S_IFLNK  # Unix's file mode
    entries["kind"] = np.where(central["flags"] & 1, ENCRYPTED, np.where(link, LINK, PLAIN))
    long = (central["size"] == FULL) | (central["packed"] == FULL) | (central["offset"] == FULL)
    for row in np.flatnonzero(long):
        first = starts[row] + CENTRAL.itemsize + int(central["name"][row])
        extra = buffer[first : first + int(central["extra"][row])]
        numbers = _long_numbers(extra, *(int(central[name][row]) for name in LONG))
        entries["size"][row], entries["packed"][row], entries["offset"][row] = numbers
    return entries


LONG = ("size", "packed", "offset")  # in the order of the zip64 extra field


def _long_numbers(extra: bytes, *short: int) -> list[int]:
    """The numbers of an entry; each one that is FULL is taken from the zip64 extra field, if there is one."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == ZIP64:
            long = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4) if at + 4 + size <= len(extra) else ())
            try:
                return [next(long) if number == FULL else number for number in short]
            except StopIteration as error:
                raise DamagedArchive("a zip64 extra field that is too short") from error
        at += 4 + size
    return list(short)
