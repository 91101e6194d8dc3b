"""The central directory as arrays: what zipfile writes of every kind is found, and damage is told."""

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


def pack(place: Path, members: dict[str, bytes] = MEMBERS) -> Path:
    with zipfile.ZipFile(place, "w") as packed:
        for index, (name, data) in enumerate(members.items()):
            packed.writestr(name, data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[index % 2])
    return place


def read_all(place: Path) -> dict[str, bytes]:
    archive = ZipArchive(str(place))
    found = {name: archive.read(name, 1 << 20) for name in MEMBERS}
    archive.close()
    return found


def index_of(data: bytes) -> ZipIndex:
    return ZipIndex(lambda start, size: data[start : start + size], len(data))


def test_zip64_with_long_sizes_places_and_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
    place = pack(tmp_path / "x.zip")
    assert place.read_bytes().count(b"PK\x06\x06") == 1
    assert read_all(place) == MEMBERS


def test_an_archive_behind_something_else(tmp_path) -> None:
    place = pack(tmp_path / "x.zip")
    place.write_bytes(b"#!/bin/sh\n" * 50 + place.read_bytes())
    assert read_all(place) == MEMBERS


@pytest.mark.parametrize("piece", [7, 100, 1000])
def test_the_directory_is_read_in_pieces(tmp_path, monkeypatch, piece: int) -> None:
    monkeypatch.setattr(zip_index, "PIECE", piece)
    assert read_all(pack(tmp_path / "x.zip")) == MEMBERS


def test_a_long_local_extra_field_and_a_name_that_is_there_twice(tmp_path) -> None:
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
    for name, held in {"ü.jpg": data, "üü.jpg": dos}.items():
        for number, whole in enumerate([held, bytes(unflagged)] if name == "ü.jpg" else [held]):
            (tmp_path / f"{number}.zip").write_bytes(whole)
            assert ZipArchive(str(tmp_path / f"{number}.zip")).read(name, 100) == b"u"


def test_what_a_member_costs(tmp_path) -> None:
    held = index_of(pack(tmp_path / "x.zip").read_bytes())
    assert (held.names.nbytes + held.entries.nbytes, len(held)) == (39 * 40, 40)
    assert (ENTRY.itemsize, CENTRAL.itemsize) == (31, 46)
    assert np.all(np.diff(held.names) > 0)
    assert held.find(b"set/40.jpg") is None


def test_damage_of_any_kind_is_told(tmp_path) -> None:
    """Bits turned anywhere: the archive is refused, or every member is its own bytes or a reject; seldom all of them."""
    data, place, reasons = pack(tmp_path / "x.zip").read_bytes(), tmp_path / "damaged.zip", Counter[str]()
    for seed in range(400):
        drawn, damaged = random.Random(seed), bytearray(data)
        for _ in range(drawn.randrange(1, 6)):
            damaged[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        place.write_bytes(damaged[: drawn.randrange(len(data)) if seed % 8 == 0 else None])
        try:
            archive = ZipArchive(str(place))
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
