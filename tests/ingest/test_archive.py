"""Media in a zip archive, read without unpacking, whatever its headers say."""

import io
import json
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ingest.source import image, job, row, table

import pipelines
from voco.errors import Refused
from voco.ingest.media.archive import AnyName, MediaFolder, ZipArchive, check_media, is_archive, open_media, other_names
from voco.ingest.source_row import BadRow

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]


def pack(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, data in members.items():
            packed.writestr(name, data)
    return path


def reason(path: Path, name: str, limit: int = 1 << 20) -> str:
    with pytest.raises(BadRow) as caught:
        ZipArchive(str(path)).read(name, limit)
    assert name in caught.value.detail
    return caught.value.reason


def put(data: bytearray, signature: bytes, at: int, value: int, width: int) -> None:
    """Write a header field of the first record with this signature, `at` bytes after the signature."""
    start = data.index(signature) + at
    data[start : start + width] = value.to_bytes(width, "little")


CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


@pytest.mark.parametrize("method", METHODS)
def test_members_are_read_by_name(tmp_path, method: int) -> None:
    members = {"a.jpg": image(1), "set/b.png": image(2, "PNG"), "set/ü.jpg": image(3), "empty": b""}
    archive = ZipArchive(str(pack(tmp_path / "x.zip", members, method)))
    for name, data in [*members.items(), *reversed(members.items())]:
        assert archive.read(name, 1 << 20) == data
    archive.close()


def test_a_folder_and_an_archive_are_distinguished(tmp_path) -> None:
    pack(tmp_path / "images.ZIP", {"a.jpg": image(1)})
    for uri, kind in {str(tmp_path / "images.ZIP"): ZipArchive, str(tmp_path): MediaFolder}.items():
        opened = open_media(uri)
        assert isinstance(opened, AnyName)
        assert isinstance(opened.source, kind)
    assert not is_archive("s3://bucket/images.zip.d")


def test_other_names_of_a_missing_medium() -> None:
    assert other_names("ocr/1.JPG") == ["ocr/1.jpg", "ocr/1.png", "ocr/1.gif", "ocr/1.jpeg"]
    assert other_names("012301_012350/7.mp4") == ["7.mp4"]
    assert other_names("webvid/012301_012350/7.mp4") == ["webvid/7.mp4"]  # as in LLaMA-VID's mixes
    for path in ("7.mp4", "a/7.mp4", "012301_012350/x/7.mp4", "x012301_012350/7.mp4", "012301_0123500/7.mp4"):
        assert other_names(path) == []


def test_members_that_must_not_be_read(tmp_path) -> None:
    archive = pack(tmp_path / "x.zip", {"good.jpg": image(1), "set/": b"", "big": b"x" * 1001, "set/a.jpg": image(2)})
    with zipfile.ZipFile(archive, "a") as packed:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "/etc/passwd")
        packed.writestr("packed.bz2", b"x" * 100, zipfile.ZIP_BZIP2)
    assert reason(archive, "gone.jpg") == "missing_media"
    assert reason(archive, "set") == "missing_media"
    assert reason(archive, "link.jpg") == "unsafe_path"
    assert reason(archive, "big", 1000) == "media_too_large"
    assert reason(archive, "packed.bz2") == "unsupported_format"
    assert ZipArchive(str(archive)).read("big", 1001) == b"x" * 1001


def test_an_encrypted_member(tmp_path) -> None:
    data = bytearray(pack(tmp_path / "x.zip", {"a.jpg": image(1)}).read_bytes())
    put(data, CENTRAL, 8, 1, 2)  # the flag for which zipfile requires a password
    (tmp_path / "x.zip").write_bytes(data)
    assert reason(tmp_path / "x.zip", "a.jpg") == "unsupported_format"


@pytest.mark.parametrize("method", METHODS)
def test_damage_inside_a_member_is_corrupt_and_costs_that_member(tmp_path, method: int) -> None:
    data = bytearray(pack(tmp_path / "x.zip", {"a.jpg": image(1), "b.jpg": image(2)}, method).read_bytes())
    data[200] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    assert reason(tmp_path / "x.zip", "a.jpg") == "corrupt_media"
    assert ZipArchive(str(tmp_path / "x.zip")).read("b.jpg", 1 << 20) == image(2)


@pytest.mark.parametrize(
    ("signature", "at", "value", "width"),
    [
        (LOCAL, 0, 0, 4),
        (LOCAL, 30, 0x7A7A, 2),
        (CENTRAL, 16, 7, 4),
        (CENTRAL, 42, 0x7FFFFF, 4),
        (CENTRAL, 20, 3, 4),
        (LOCAL, 26, 60_000, 2),
    ],
    ids=["no local header", "another name", "another checksum", "an offset past the end", "a short size", "a long name"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_header_is_corrupt(tmp_path, method: int, signature: bytes, at: int, value: int, width: int) -> None:
    data = bytearray(pack(tmp_path / "x.zip", {"a.jpg": image(1)}, method).read_bytes())
    put(data, signature, at, value, width)
    (tmp_path / "x.zip").write_bytes(data)
    assert reason(tmp_path / "x.zip", "a.jpg") == "corrupt_media"


def test_a_header_that_lies_about_the_size_fills_no_memory(tmp_path) -> None:
    """256 MiB of zeros, compressed to a quarter MiB, with 1000 bytes in the header: 1000 bytes are unpacked, then rejected."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed, packed.open("a.jpg", "w", force_zip64=True) as member:
        for _ in range(256):
            member.write(bytes(1 << 20))
    data = bytearray(buffer.getvalue())
    put(data, CENTRAL, 24, 1000, 4)
    (tmp_path / "x.zip").write_bytes(data)
    script = (
        "import resource, sys; from voco.ingest.media.archive import ZipArchive; from voco.ingest.source_row import BadRow\n"
        "archive = ZipArchive(sys.argv[1]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: archive.read('a.jpg', 1 << 20)\n"
        "except BadRow as bad: print(bad.reason, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x.zip")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    rejected, grown = done.stdout.split()
    assert rejected == "corrupt_media"
    assert int(grown) < 50  # MiB
    put(data, CENTRAL, 24, 1 << 28, 4)  # now the true size
    (tmp_path / "x.zip").write_bytes(data)
    assert reason(tmp_path / "x.zip", "a.jpg") == "media_too_large"


@pytest.mark.parametrize("data", [b"", b"no zip", b"PK\x05\x06" + b"\0" * 10, None], ids=["empty", "text", "cut", "truncated"])
def test_an_archive_that_cannot_be_read_is_refused(tmp_path, data: bytes | None) -> None:
    archive = pack(tmp_path / "x.zip", {f"{index}.jpg": image(index) for index in range(5)})
    archive.write_bytes(archive.read_bytes()[:-60] if data is None else data)
    with pytest.raises(Refused, match=r"inputs.media: .*x.zip: expected a zip archive that can be read"):
        check_media(str(archive))


def test_a_folder_named_as_an_archive_and_an_absent_archive_are_refused(tmp_path) -> None:
    (tmp_path / "x.zip").mkdir()
    for name in ("x.zip", "gone.zip"):
        with pytest.raises(Refused, match="expected a zip archive"):
            check_media(str(tmp_path / name))
    check_media(str(tmp_path))
    check_media(None)


def test_a_folder_of_the_archives_own_name_may_be_there_or_not(tmp_path) -> None:
    archive = ZipArchive(str(pack(tmp_path / "images.zip", {"images/a.jpg": b"a", "b.jpg": b"b", "images/b.jpg": b"other"})))
    paths = ("images/a.jpg", "a.jpg", "b.jpg", "images/b.jpg")
    assert [archive.read(path, 100) for path in paths] == [b"a", b"a", b"b", b"other"]
    with pytest.raises(BadRow, match="missing_media"):
        archive.read("set/a.jpg", 100)


def folder_of_archives(root: Path) -> MediaFolder:
    (root / "vg" / "VG_100K").mkdir(parents=True)
    (root / "vg" / "VG_100K" / "1.jpg").write_bytes(b"a file")
    pack(root / "vg" / "images.zip", {"VG_100K/1.jpg": b"not this", "VG_100K/2.jpg": b"first", "both.jpg": b"no"})
    pack(root / "vg" / "images2.zip", {"VG_100K/2.jpg": b"second", "VG_100K_2/3.jpg": b"3"})
    pack(root / "a.zip", {"vg/VG_100K_2/3.jpg": b"above", "vg/VG_100K_2/4.jpg": b"4", "x.jpg": b"x"})
    pack(root / "ocr_vqa.zip", {"images/5.jpg": b"flat", "set/6.jpg": b"6"})
    return MediaFolder(str(root))


def test_archives_stand_in_for_the_folders_beside_them(tmp_path) -> None:
    """The file first, then the archives of the nearest folder, by name. Each is listed and opened once, when it is needed."""
    media = folder_of_archives(tmp_path / "media")
    assert media.read("vg/VG_100K/1.jpg", 100) == b"a file"
    assert (media.listed, media.opened) == ({}, {})
    expected = {
        "vg/VG_100K/2.jpg": b"first", "vg/VG_100K_2/3.jpg": b"3", "vg/VG_100K_2/4.jpg": b"4", "x.jpg": b"x",
        "ocr_vqa/images/5.jpg": b"flat",
    }  # fmt: skip
    assert {path: media.read(path, 100) for path in expected} == expected
    assert set(media.listed) == {"vg", ""}
    for path in (
        "a/" * 200_000 + "1.jpg",
        "vg/" * 200_000 + "1.jpg",
        "vg/VG_100K/9.jpg",
        "vg/both.jpg",
        "gqa/images/1.jpg",
        "9.jpg",
        "vg",
        "vg/images.zip/both.jpg",
    ):
        with pytest.raises(BadRow, match="missing_media"):
            media.read(path, 100)
    with pytest.raises(
        BadRow, match=r"9.jpg: No such file or directory, nor in vg/images.zip, nor in vg/images2.zip, nor in a.zip"
    ):
        media.read("vg/VG_100K/9.jpg", 100)
    assert media.read("vg/VG_100K/1.jpg", 100) == b"a file"
    assert set(media.opened) == {"vg/images.zip", "vg/images2.zip", "a.zip", "ocr_vqa.zip"}


def test_an_archive_in_a_folder_that_cannot_be_used_costs_what_only_it_may_have(tmp_path) -> None:
    root = tmp_path / "media"
    media = folder_of_archives(root)
    (root / "vg" / "a.zip").write_bytes(b"half a downl")
    (root / "vg" / "b.zip").mkdir()
    pack(tmp_path / "outside.zip", {"coco/1.jpg": b"secret"})
    (root / "b.zip").symlink_to(tmp_path / "outside.zip")
    (root / "link").symlink_to(tmp_path)
    assert media.read("vg/VG_100K/2.jpg", 100) == b"first"
    damaged = r"which cannot be read \(DamagedArchive: no end of a central directory\)"
    for path, why in {
        "vg/VG_100K/9.jpg": rf"a.zip, {damaged}, nor in vg/images.zip",
        "coco/1.jpg": r"nor in b.zip, which cannot be read \(b.zip: a link leads out of the media folder\)",
    }.items():
        with pytest.raises(BadRow, match=f"missing_media.*{path}: .*{why}"):
            media.read(path, 100)
    with pytest.raises(BadRow, match="missing_media"):
        media.read("link/outside/coco/1.jpg", 100)
    with pytest.raises(BadRow, match=r"media_too_large.*vg/VG_100K_2/4.jpg: "):
        media.read("vg/VG_100K_2/4.jpg", 0)


def test_an_image_under_another_extension(tmp_path) -> None:
    """OCR-VQA: the row says .jpg, the web had a gif. The row's name comes first; only images have alternative names."""
    (tmp_path / "ocr_vqa").mkdir()
    for name in ("a.gif", "b.jpg", "b.png", "c.png", "c.gif", "v.mkv"):
        (tmp_path / "ocr_vqa" / name).write_bytes(name.encode())
    (tmp_path / "ocr_vqa" / "e.png").symlink_to("/etc/passwd")
    pack(tmp_path / "ocr_vqa.zip", {"d.jpeg": b"d.jpeg", "a.jpg": b"a.jpg in the archive"})
    media = open_media(str(tmp_path))
    expected = {
        "a.jpg": b"a.jpg in the archive",
        "b.jpg": b"b.jpg",
        "c.jpg": b"c.png",
        "a.png": b"a.jpg in the archive",
        "d.gif": b"d.jpeg",
    }
    assert {path: media.read(f"ocr_vqa/{path}", 100) for path in expected} == expected
    assert open_media(str(tmp_path / "ocr_vqa.zip")).read("d.jpg", 100) == b"d.jpeg"
    for path, reason in {
        "x.jpg": "missing_media",
        "v.mp4": "missing_media",
        "b": "missing_media",
        "e.jpg": "unsafe_path",
    }.items():
        with pytest.raises(BadRow) as caught:
            media.read(f"ocr_vqa/{path}", 100)
        assert caught.value.reason == reason
        assert caught.value.detail.startswith("ocr_vqa/e.png" if path == "e.jpg" else f"ocr_vqa/{path}")


@pytest.mark.parametrize("method", METHODS)
def test_cc3m_from_its_archive_equals_its_folder(tmp_path, method: int) -> None:
    """LLaVA's CC3M layout, `chat.json` and a flat `images.zip`: the same table as from the unpacked folder."""
    names = [f"GCC_train_{index:09d}.jpg" for index in range(12)]
    images = {name: image(index) for index, name in enumerate(names)}
    prompts = ("Give a short description.\n<image>", "<image>\nWhat is in the picture?")
    listed = [
        row(name.removesuffix(".jpg"), name, prompts[index % 2], f"a thing number {index} .") for index, name in enumerate(names)
    ]
    listed.append(row("GCC_train_999999999", "GCC_train_999999999.jpg", prompts[0], "a link that died ."))
    (tmp_path / "mix.json").write_text(json.dumps(listed))
    (tmp_path / "images").mkdir()
    for name, data in images.items():
        (tmp_path / "images" / name).write_bytes(data)
    pack(tmp_path / "images.zip", images, method)
    outputs = {}
    for media in ("images", "images.zip"):
        archive_job = job(tmp_path, tmp_path / f"out-{media}", unit_rows=5, max_missing_share=0.1)
        inputs = archive_job.inputs.model_copy(update={"media": str(tmp_path / media)})
        done = pipelines.run(archive_job.model_copy(update={"inputs": inputs}))
        assert done.counts == {"read": 13, "written": 12, "samples": 12, "rejected": {"missing_media": 1}}
        outputs[media] = table(tmp_path / f"out-{media}", "samples")
    assert outputs["images"] == outputs["images.zip"]
    assert {sample["conversations"][0]["placeholder"] for sample in outputs["images"]} == {"after", "before"}
