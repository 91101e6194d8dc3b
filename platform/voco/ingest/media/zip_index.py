"""A zip's central directory as two arrays, 39 bytes a member, sorted by a hash of the name. (APPNOTE.TXT 6.3, sections 4.3, 4.4.)

zipfile keeps an object of 550 bytes for each member; LLaVA's images are 600,000 members in seven archives, in every worker.
Names are not kept: whoever reads a member finds its name once more before its bytes, and compares.
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

ENTRY = np.dtype([("at", "<u8"), ("packed", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("method", "<u2"), ("kind", "u1")])
PLAIN, LINK, ENCRYPTED = range(3)  # `kind`; `at` is the place of the local header, `packed` the bytes as stored

CENTRAL = np.dtype(
    [
        ("mark", "<u4"), ("made", "<u2"), ("needed", "<u2"), ("flags", "<u2"), ("method", "<u2"), ("time", "<u4"), ("crc", "<u4"),
        ("packed", "<u4"), ("size", "<u4"), ("name", "<u2"), ("extra", "<u2"), ("comment", "<u2"), ("disk", "<u2"),
        ("internal", "<u2"), ("attributes", "<u4"), ("at", "<u4"),
    ]
)  # fmt: skip
LENGTHS = struct.Struct("<28xHHH")  # of the name, the extra fields and the comment behind an entry of the directory
END = struct.Struct("<I2x2x2xHIIH")  # signature, entries, size and place of the directory, length of the comment
END64 = struct.Struct("<I8x2x2x4x4x8xQQQ")
LOCATOR64 = struct.Struct("<I4xQ4x")  # before END, behind END64
CENTRAL_MARK, LOCAL_MARK, END_MARK, END64_MARK, LOCATOR64_MARK = 0x02014B50, 0x04034B50, 0x06054B50, 0x06064B50, 0x07064B50
LONGEST_COMMENT = 0xFFFF
ZIP64, FULL = 0x0001, 0xFFFFFFFF  # the extra field of long numbers, and the short number that refers to it

PIECE = 4 << 20  # bytes of the directory that are read at once

Piece = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]


class ZipIndex:
    """Every member of an archive of `total` bytes. Raises DamagedArchive. Holds twice its own size while it sorts."""

    def __init__(self, read_at: ReadAt, total: int) -> None:
        start, size, shift = _directory(read_at, total)
        pieces = list(_pieces(read_at, start, size))
        names = np.concatenate([np.empty(0, np.int64), *(names for names, _ in pieces)])
        entries = np.concatenate([np.empty(0, ENTRY), *(entries for _, entries in pieces)])
        del pieces
        entries["at"] += np.uint64(shift)
        order = np.argsort(names, kind="stable")
        self.names, self.entries = names[order], entries[order]

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: bytes) -> np.void | None:
        """The ENTRY with this name, by its hash alone; the last one where a name is there twice, as unpacking leaves it."""
        wanted = hash(name)  # keyed anew in every process: nobody can make names that collide
        at = int(np.searchsorted(self.names, wanted, side="right")) - 1
        return self.entries[at] if at >= 0 and self.names[at] == wanted else None


def _directory(read_at: ReadAt, total: int) -> tuple[int, int, int]:
    """First byte and size of the directory, and by how much every place in it is off: by what was put before the archive."""
    before = END64.size + LOCATOR64.size
    tail_at = max(0, total - before - END.size - LONGEST_COMMENT)
    tail = read_at(tail_at, total - tail_at)
    found = tail.rfind(END_MARK.to_bytes(4, "little"))
    if found < 0 or found + END.size > len(tail):
        raise DamagedArchive("no end of a central directory")
    _, _, size, start, _ = END.unpack_from(tail, found)
    if tail[max(0, found - LOCATOR64.size) : found][:4] == LOCATOR64_MARK.to_bytes(4, "little"):
        found -= before
        if found < 0 or tail[found : found + 4] != END64_MARK.to_bytes(4, "little"):
            raise DamagedArchive("no end of a zip64 central directory")
        _, _, size, start = END64.unpack_from(tail, found)
    end = tail_at + found
    shift = end - size - start
    if shift < 0:
        raise DamagedArchive(f"a central directory of {size} bytes at byte {start}, which would end behind byte {end}")
    return start + shift, size, shift


def _pieces(read_at: ReadAt, start: int, size: int) -> Iterator[Piece]:
    """Hashes of the names (int64) and ENTRYs, in the archive's order."""
    held, at, end = b"", start, start + size
    while at < end:
        piece = read_at(at, min(PIECE, end - at))
        if not piece:
            raise DamagedArchive(f"the file ends at byte {at}, in its central directory")
        held, at = held + piece, at + len(piece)
        starts, names, used = _walk(held)
        if starts:
            yield np.array(names, np.int64), _entries(held, starts, at - len(held))
        held = held[used:]
    if held:
        raise DamagedArchive("its central directory ends inside an entry")


def _walk(held: bytes) -> tuple[list[int], list[int], int]:
    """Where the whole entries begin, the hashes of their names, and where the last one ends."""
    starts, names, at = [], [], 0
    while len(held) - at >= CENTRAL.itemsize:
        name, extra, comment = LENGTHS.unpack_from(held, at)
        first = at + CENTRAL.itemsize
        behind = first + name + extra + comment
        if behind > len(held):
            break
        starts.append(at)
        names.append(hash(held[first : first + name]))
        at = behind
    return starts, names, at


def _entries(held: bytes, starts: list[int], place: int) -> np.ndarray[Any, Any]:
    """ENTRYs of the directory's entries at `starts`; `place` is that of `held` in the file."""
    told = sliding_window_view(np.frombuffer(held, np.uint8), CENTRAL.itemsize)[starts].view(CENTRAL)[:, 0]
    wrong = np.flatnonzero(told["mark"] != CENTRAL_MARK)
    if len(wrong):
        raise DamagedArchive(f"no entry of the central directory at byte {place + starts[wrong[0]]}")
    made = np.empty(len(starts), ENTRY)
    for field in ("at", "packed", "size", "crc", "method"):
        made[field] = told[field]
    link = (told["attributes"] >> 16) & 0o170000 == stat.S_IFLNK  # as Unix writes a file's mode
    made["kind"] = np.where(told["flags"] & 1, ENCRYPTED, np.where(link, LINK, PLAIN))
    long = (told["size"] == FULL) | (told["packed"] == FULL) | (told["at"] == FULL)
    for row in np.flatnonzero(long):
        first = starts[row] + CENTRAL.itemsize + int(told["name"][row])
        extra = held[first : first + int(told["extra"][row])]
        made["size"][row], made["packed"][row], made["at"][row] = _long(extra, *(int(told[name][row]) for name in LONG))
    return made


LONG = ("size", "packed", "at")  # in the order in which the zip64 extra field has them


def _long(extra: bytes, *short: int) -> list[int]:
    """The numbers of an entry: those that say FULL stand in the zip64 extra field, if there is one."""
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
