"""The central directory as arrays: finds whatever zipfile writes, and reports damage."""

import random
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from voco.ingest.media import zip_index
from voco.ingest.media.archive import ZipArchive
from voco.ingest.media.zip_index import CENTRAL, ENTRY, ZipIndex
from voco.ingest.source_row import BadRow, DamagedArchive

MEMBERS = {f"set/{index}.jpg": bytes([index]) * (index * 37 % 300) for index in range(40)}


def pack(path: Path, members: dict[str, bytes] = MEMBERS) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for index, (name, data) in enumerate(members.items()):
            packed.writestr(name, data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[index % 2])
    return path


def read_all(path: Path) -> dict[str, bytes]:
    archive = ZipArchive(str(path))
    contents = {name: archive.read(name, 1 << 20) for name in MEMBERS}
    archive.close()
    return contents


def index_of(data: bytes) -> ZipIndex:
    return ZipIndex(lambda start, size: data[start : start + size], len(data))


def test_zip64_with_long_sizes_offsets_and_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
    path = pack(tmp_path / "x.zip")
    assert path.read_bytes().count(b"PK\x06\x06") == 1
    assert read_all(path) == MEMBERS


def test_an_archive_after_other_bytes(tmp_path) -> None:
    path = pack(tmp_path / "x.zip")
    path.write_bytes(b"#!/bin/sh\n" * 50 + path.read_bytes())
    assert read_all(path) == MEMBERS


@pytest.mark.parametrize("piece", [7, 100, 1000])
def test_the_directory_is_read_in_pieces(tmp_path, monkeypatch, piece: int) -> None:
    monkeypatch.setattr(zip_index, "PIECE", piece)
    assert read_all(pack(tmp_path / "x.zip")) == MEMBERS


def test_a_long_local_extra_field_and_a_name_used_twice(tmp_path) -> None:
    info = zipfile.ZipInfo("a.jpg")
    info.extra = b"\xfe\xca" + (1000).to_bytes(2, "little") + bytes(1000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("a.jpg", b"first")
        with pytest.warns(UserWarning, match="Duplicate name"):
            packed.writestr(info, b"last")
    assert ZipArchive(str(tmp_path / "x.zip")).read("a.jpg", 100) == b"last"


def test_names_in_utf_8_flagged_or_not_and_in_doss_code(tmp_path) -> None:
    data = pack(tmp_path / "x.zip", {"ü.jpg": b"u"}).read_bytes()
    unflagged = bytearray(data)
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        at = unflagged.index(mark) + (7 if mark == b"PK\x03\x04" else 9)
        unflagged[at] &= ~0x08
    dos = bytes(pack(tmp_path / "y.zip", {"@@.jpg": b"u"}).read_bytes()).replace(b"@@", "üü".encode("cp437"))
    for name, archive in {"ü.jpg": data, "üü.jpg": dos}.items():
        for number, content in enumerate([archive, bytes(unflagged)] if name == "ü.jpg" else [archive]):
            (tmp_path / f"{number}.zip").write_bytes(content)
            assert ZipArchive(str(tmp_path / f"{number}.zip")).read(name, 100) == b"u"


def test_what_a_member_costs(tmp_path) -> None:
    index = index_of(pack(tmp_path / "x.zip").read_bytes())
    assert (index.names.nbytes + index.entries.nbytes, len(index)) == (39 * 40, 40)
    assert (ENTRY.itemsize, CENTRAL.itemsize) == (31, 46)
    assert np.all(np.diff(index.names) > 0)
    assert index.find(b"set/40.jpg") is None


def test_damage_of_any_kind_is_reported(tmp_path) -> None:
    """Bits flipped anywhere: the archive is damaged, or each member gives its own bytes or a reject."""
    data, path, reasons = pack(tmp_path / "x.zip").read_bytes(), tmp_path / "damaged.zip", Counter[str]()
    for seed in range(400):
        drawn, damaged = random.Random(seed), bytearray(data)
        for _ in range(drawn.randrange(1, 6)):
            damaged[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        path.write_bytes(damaged[: drawn.randrange(len(data)) if seed % 8 == 0 else None])
        try:
            archive = ZipArchive(str(path))
        except DamagedArchive:
            reasons["damaged"] += 1
            continue
        for name, content in MEMBERS.items():
            try:
                assert archive.read(name, 1 << 20) == content
            except BadRow as bad:
                reasons[bad.reason] += 1
        archive.close()
    assert reasons["damaged"] > 40
    assert reasons["corrupt_media"] > 200
    assert set(reasons) <= {"damaged", "corrupt_media", "missing_media", "unsupported_format", "unsafe_path", "media_too_large"}


def test_numbers_that_lead_nowhere_are_damage(tmp_path) -> None:
    data = pack(tmp_path / "x.zip").read_bytes()
    end = data.rindex(b"PK\x05\x06")
    for at, value in {12: 0x7FFFFFFF, 16: 0x7FFFFFFF}.items():
        wrong = bytearray(data)
        wrong[end + at : end + at + 4] = value.to_bytes(4, "little")
        with pytest.raises(DamagedArchive, match="central directory"):
            index_of(bytes(wrong))
    locator = b"PK\x06\x07" + bytes(16)
    with pytest.raises(DamagedArchive, match="zip64"):
        index_of(data[:end] + locator + data[end:])
