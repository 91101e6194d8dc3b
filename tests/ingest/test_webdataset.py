"""WebDataset shards: the rows of good shards, and the rejects of hostile ones."""

import hashlib
import os
import tarfile
from pathlib import Path

import pytest
from ingest.clips import clip
from ingest.shards import job, pack, sample, write
from ingest.source import image, part_hashes, table
from real_data import SHARED
from webdataset.tariterators import base_plus_ext

import pipelines
from voco.errors import Refused
from voco.ingest.captions import IMAGE_REQUESTS, image_request
from voco.ingest.formats.webdataset import has_key, read, split_key
from voco.ingest.media.tar import TarShards
from voco.ingest.source_row import BadRow, Reject, SourceRow, sample_id
from voco.job.config import Ingest
from voco.run import manifest

REAL = SHARED / "clips" / "return_all_test.tar"  # as video2dataset's tests have it
BLOCK = Ingest(format="webdataset", dataset="cc3m", max_text_bytes=2000)


def rows(uri: Path, block: Ingest = BLOCK) -> list[SourceRow | Reject]:
    return list(read(str(uri), block, None))


def single_reject(uri: Path, block: Ingest = BLOCK) -> Reject:
    (bad,) = [row for row in rows(uri, block) if isinstance(row, Reject)]
    assert bad.detail.encode()
    return bad


def bytes_of(folder: Path, item: SourceRow) -> bytes:
    (source,) = TarShards(str(folder)).sources([item.location])
    return source.read(item.paths[0], 1 << 20)


def two_shards(folder: Path) -> dict[str, bytes]:
    """Shards with gaps in their keys, of several formats. Returns each medium's bytes."""
    media = {
        **{f"00000{index:04d}.jpg": image(index) for index in (0, 1, 4)},
        "000010002.png": image(9, "PNG"),
        "000010007.webp": image(8, "WEBP"),
    }
    for shard in (0, 1):
        samples = [
            sample(name.split(".")[0], data, f"caption of {name}", name.split(".")[1])
            for name, data in media.items()
            if name[4] == str(shard)
        ]
        write(folder / f"0000{shard}.tar", samples)
        (folder / f"0000{shard}_stats.json").write_text("{}")
    return media


def test_shards_of_webdatasets_writer(tmp_path) -> None:
    media = two_shards(tmp_path / "cc3m")
    done = pipelines.run(job(tmp_path / "cc3m", tmp_path / "out", unit_rows=2))
    assert done.counts == {"read": 5, "written": 5, "samples": 5, "rejected": {}}
    parsed = {row["media"][0]["path"]: row for row in table(tmp_path / "out", "samples")}
    assert {path: row["media"][0]["bytes"] for path, row in parsed.items()} == media
    for path, row in parsed.items():
        key = path.split(".")[0]
        (talk,) = row["conversations"]
        request, placeholder = image_request(key)
        assert talk["source_id"] == key
        assert talk["placeholder"] == placeholder
        assert [turn["text"] for turn in talk["turns"]] == [request, f"caption of {path}"]
        assert f'"url":"https://host/{key}"' in talk["extra"]
        assert '"caption"' not in talk["extra"]


def test_golden_sample_id_is_of_key_and_extension_not_of_the_shard(tmp_path) -> None:
    shard = write(tmp_path / "a" / "00000.tar", [sample("000000007", image(1))])
    (first,) = rows(shard)
    write(tmp_path / "b" / "00033.tar", [sample("000000006", image(2)), sample("000000007", image(1))])
    _, second = rows(tmp_path / "b")
    assert isinstance(first, SourceRow)
    assert isinstance(second, SourceRow)
    assert first.source == "00000.tar:0"
    assert second.source == "00033.tar:1"
    expected = hashlib.sha256(b'["cc3m","train",["000000007.jpg"]]').hexdigest()[:32]
    assert sample_id("cc3m", "train", first) == sample_id("cc3m", "train", second) == expected


def test_requests_are_by_the_key_and_all_are_used() -> None:
    assert image_request("000000007") == image_request("000000007")
    requests = {image_request(f"{number:09d}") for number in range(300)}
    assert requests == {(request, position) for request in IMAGE_REQUESTS for position in ("before", "after")}


def test_videos(tmp_path) -> None:
    data = clip()
    write(tmp_path / "v" / "00000.tar", [sample("000000003", data, "a bar", "mp4"), sample("000000004", data[:-100], "b", "mp4")])
    done = pipelines.run(job(tmp_path / "v", tmp_path / "out"))
    assert done.counts["rejected"] == {"corrupt_media": 1}
    (row,) = table(tmp_path / "out", "samples")
    assert (row["modality"], row["media"][0]["path"], row["media"][0]["bytes"]) == ("video", "000000003.mp4", data)
    assert row["conversations"][0]["placeholder"] == "after"


def test_captions(tmp_path) -> None:
    """The .txt first, else the json's caption; a sample with neither is a reject."""
    data = image(1)
    spoken = [sample("1", data, "x"), sample("2", data, None), sample("3", data, ""), sample("4", data, None)]
    spoken[1]["json"] = b'{"caption": " from json "}'
    spoken[2]["json"] = b'{"caption": "from json"}'
    parsed = rows(write(tmp_path / "x.tar", spoken))
    texts = [row.turns[1][1] if isinstance(row, SourceRow) else row.reason for row in parsed]
    assert texts == ["x", "from json", "from json", "empty_text"]


def test_what_was_not_downloaded(tmp_path) -> None:
    failed = sample("2", None, "x", status="failed_to_download", error_message="HTTP Error 404")
    parsed = rows(write(tmp_path / "x.tar", [sample("1", image(1)), failed, sample("3", None)]))
    assert [row.reason for row in parsed if isinstance(row, Reject)] == ["download_failed", "missing_media"]
    assert isinstance(parsed[1], Reject)
    assert "HTTP Error 404" in parsed[1].detail


def link(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    head = tarfile.TarInfo(name)
    head.type, head.linkname = kind, "/etc/passwd"
    return head


BAD = {
    "an absolute path": ([("/etc/a.jpg", b"x"), ("/etc/a.txt", b"c")], "unsafe_path"),
    "a path that climbs": ([("../../a.jpg", b"x"), ("../../a.txt", b"c")], "unsafe_path"),
    "a symbolic link": ([link("a.jpg"), ("a.txt", b"c")], "unsafe_path"),
    "a hard link": ([link("a.jpg", tarfile.LNKTYPE), ("a.txt", b"c")], "unsafe_path"),
    "a device": ([link("a.jpg", tarfile.CHRTYPE), ("a.txt", b"c")], "unsafe_path"),
    "a linked caption": ([("a.jpg", b"x"), link("a.txt")], "unsafe_path"),
    "the same member twice": ([("a.jpg", b"x"), ("a.jpg", b"y"), ("a.txt", b"c")], "bad_record"),
    "two captions": ([("a.jpg", b"x"), ("a.txt", b"c"), ("a.txt", b"d")], "bad_record"),
    "an image and a video": ([("a.jpg", b"x"), ("a.mp4", b"y"), ("a.txt", b"c")], "bad_record"),
    "no JSON": ([("a.jpg", b"x"), ("a.json", b"{"), ("a.txt", b"c")], "bad_record"),
    "JSON that is no object": ([("a.jpg", b"x"), ("a.json", b"[1]"), ("a.txt", b"c")], "bad_record"),
    "deep JSON": ([("a.jpg", b"x"), ("a.json", b"[" * 1999), ("a.txt", b"c")], "bad_record"),
    "a long caption": ([("a.jpg", b"x"), ("a.txt", b"c" * 3000)], "text_too_large"),
    "a caption that is not UTF-8": ([("a.jpg", b"x"), ("a.txt", b"\xff\xfe")], "bad_record"),
    "a name that is not UTF-8": ([("a\udcff.jpg", b"x"), ("a\udcff.txt", b"c")], "bad_record"),
    "no caption": ([("a.jpg", b"x")], "empty_text"),
    "no medium": ([("a.txt", b"c")], "missing_media"),
    "an unknown member only": ([("a.cls", b"3")], "missing_media"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_costs_itself_only(tmp_path, name: str) -> None:
    members, reason = BAD[name]
    good = [("0.jpg", image(1)), ("0.txt", b"c")]
    last = [("z.jpg", image(2)), ("z.txt", b"c")]
    shard = pack(tmp_path / "x.tar", *good, *members, *last)
    parsed = rows(shard)
    bad = single_reject(shard)
    assert (bad.source, bad.reason) == ("x.tar:1", reason)
    assert [row.paths for row in parsed if isinstance(row, SourceRow)] == [("0.jpg",), ("z.jpg",)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_with_folders_and_long_names(tmp_path, form: int) -> None:
    data = {f"{'d' * 60}/./{'e' * 60}/ü{index}.JPG": image(index) for index in range(3)}
    folder = tarfile.TarInfo("d" * 60)
    folder.type = tarfile.DIRTYPE
    members = [member for name, content in data.items() for member in ((name, content), (name.replace("JPG", "txt"), b"c"))]
    parsed = rows(pack(tmp_path / "x.tar", folder, *members, form=form))
    assert [row.paths[0] for row in parsed if isinstance(row, SourceRow)] == [
        name.replace("/./", "/").replace("JPG", "jpg") for name in data
    ]
    assert [bytes_of(tmp_path, row) for row in parsed if isinstance(row, SourceRow)] == list(data.values())


def test_a_shard_that_is_cut_anywhere_says_so(tmp_path) -> None:
    complete = write(tmp_path / "x.tar", [sample(f"{index}", image(index)) for index in range(3)]).read_bytes()
    ends = complete.rstrip(b"\0")
    for length in [0, 100, 512, *range(600, len(ends), 700), len(ends)]:
        shard = tmp_path / "cut.tar"
        shard.write_bytes(complete[:length])
        parsed = rows(shard)
        bad = [row for row in parsed if isinstance(row, Reject)]
        assert bad, length
        assert bad[-1].reason in ("corrupt_media", "bad_record")
        for row in parsed:
            if isinstance(row, SourceRow):
                assert bytes_of(tmp_path, row) == image(int(row.paths[0][0]))


def test_damaged_headers(tmp_path) -> None:
    members = [member for index in range(3) for member in ((f"{index}.jpg", image(index)), (f"{index}.txt", b"c"))]
    shard = pack(tmp_path / "x.tar", *members)
    complete = bytearray(shard.read_bytes())
    at = complete.index(b"1.jpg\0")
    checksum = complete[:at] + b"X" + complete[at + 1 :]
    shard.write_bytes(checksum)
    parsed = rows(shard)
    assert [type(row) for row in parsed] == [SourceRow, Reject]
    assert f"byte {at}" in single_reject(shard).detail
    shard.write_bytes(b"no tar at all" * 100)
    assert single_reject(shard).reason == "bad_record"


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_huge_declared_sizes_are_not_read(tmp_path, kind: bytes) -> None:
    head = tarfile.TarInfo("a.jpg")
    head.type, head.size = kind, 1 << 40
    shard = pack(tmp_path / "x.tar", ("0.jpg", image(1)), ("0.txt", b"c"))
    shard.write_bytes(shard.read_bytes().rstrip(b"\0")[: 512 * 10])
    complete = pack(tmp_path / "y.tar", ("0.jpg", image(1)), ("0.txt", b"c" * 512)).read_bytes()
    body = complete[: 512 * (-(-len(complete.rstrip(b"\0")) // 512))]
    (tmp_path / "y.tar").write_bytes(body + head.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    first, bad = rows(tmp_path / "y.tar")
    assert isinstance(first, SourceRow)
    assert isinstance(bad, Reject)
    assert bad.reason == ("corrupt_media" if kind == tarfile.REGTYPE else "bad_record")


def named(items: list[SourceRow | Reject], fault: str) -> list[tuple[str, str]]:
    """Source and the file or key that each reject names; every reject has this fault."""
    rejects = [item for item in items if isinstance(item, Reject)]
    assert all(item.reason == "bad_record" and fault in item.detail for item in rejects), rejects
    return [(item.source, item.detail.split("'")[1]) for item in rejects]


def beside(name: str, kind: str) -> list[str]:
    """The members that a tool adds before a file."""
    folder, _, last = name.rpartition("/")
    start = f"{folder}/" if folder else ""
    return {
        "macOS": [f"{start}._{last}", f"{start}.DS_Store"], "macOS's zip": [f"__MACOSX/{start}._{last}"],
        "pax headers as files": [f"{start}PaxHeaders.4711/{last}", f"{start}PaxHeaders/{last}"], "notes": [f"{start}LICENSE"],
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["macOS", "macOS's zip", "pax headers as files", "notes"])
@pytest.mark.parametrize("start", ["", "./", "./set/"])
def test_ignored_members_do_not_end_a_sample(tmp_path, kind: str, start: str) -> None:
    """Between any two members, as bsdtar writes AppleDouble files and Finder leaves .DS_Store."""
    files = {
        f"{start}{index:03d}.{extension}": content
        for index in range(3)
        for extension, content in (("jpg", image(index)), ("txt", b"c"))
    }
    plain = rows(pack(tmp_path / "plain" / "x.tar", *files.items()))
    noisy = [(name, files.get(name, b"\0\5\x16\7")) for file in files for name in (*beside(file, kind), file)]
    shard = pack(tmp_path / "x.tar", *noisy, (beside(f"{start}9.jpg", kind)[0], b""), form=tarfile.PAX_FORMAT)
    parsed = rows(shard)
    assert [(row.source, row.paths, row.turns) for row in parsed if isinstance(row, SourceRow)] == [
        (row.source, row.paths, row.turns) for row in plain if isinstance(row, SourceRow)
    ]
    assert len(parsed) == 3
    assert [bytes_of(tmp_path, row) for row in parsed if isinstance(row, SourceRow)] == [image(index) for index in range(3)]


@pytest.mark.skipif(not REAL.exists(), reason="video2dataset's own shard is not here")
def test_a_real_shard_packed_again_on_a_mac(tmp_path) -> None:
    with tarfile.open(REAL) as shard:
        files = [(member.name, shard.extractfile(member).read()) for member in shard if member.isfile()]  # type: ignore[union-attr]
    noisy = [entry for name, data in files for entry in ((f"._{name}", b"\0\5\x16\7"), (name, data))]
    again = rows(pack(tmp_path / "return_all_test.tar", *noisy))
    original = rows(REAL)
    assert len(original) == 6
    assert [row.turns for row in again if isinstance(row, SourceRow)] == [
        row.turns for row in original if isinstance(row, SourceRow)
    ]
    assert len(again) == len(original)


def test_a_shard_that_is_cut_in_an_ignored_member_says_so(tmp_path) -> None:
    shard = pack(tmp_path / "x.tar", ("0.jpg", image(1)), ("0.txt", b"c"), ("._1.jpg", bytes(4000)))
    data = shard.read_bytes()
    shard.write_bytes(data[: data.index(b"._1.jpg") + 1000])
    first, cut = rows(shard)
    assert isinstance(first, SourceRow)
    assert isinstance(cut, Reject)
    assert (cut.reason, "truncated" in cut.detail) == ("corrupt_media", True)


def test_members_that_are_not_adjacent_are_named(tmp_path) -> None:
    """All images, then all captions; and a caption that follows later: every group is a reject that says why."""
    images = [(f"{index}.jpg", image(index)) for index in range(3)]
    captions = [(f"{index}.txt", b"c") for index in range(3)]
    parsed = rows(pack(tmp_path / "x.tar", *images, *captions))
    assert named(parsed, "not adjacent in the shard") == [(f"x.tar:{index}", str(index % 3)) for index in range(6)]
    mixed = rows(pack(tmp_path / "y.tar", images[0], images[1], captions[1], captions[0], images[2]))
    assert named(mixed[:3:2], "not adjacent in the shard") == [("y.tar:0", "0"), ("y.tar:2", "0")]
    assert isinstance(mixed[1], SourceRow)
    assert isinstance(mixed[3], Reject)
    assert mixed[3].reason == "empty_text"  # 2.jpg has no caption anywhere


def test_base_names_with_dots_are_named_and_counted(tmp_path) -> None:
    """IMG.0001.jpg and IMG.0002.jpg have the same key. One reject for each base name; other extensions of a sample are none."""
    files = [(f"IMG.{index:04d}.{extension}", b"c") for index in range(3) for extension in ("jpg", "txt")]
    parsed = rows(pack(tmp_path / "x.tar", *files, ("a.jpg", image(1)), ("a.seg.png", b"x"), ("a.txt", b"c")))
    assert named(parsed, "a dot in its base name: WebDataset's key is 'IMG'") == [
        (f"x.tar:{index}", f"IMG.{index:04d}.jpg") for index in range(3)
    ]
    assert [row.paths for row in parsed if isinstance(row, SourceRow)] == [("a.jpg",)]


def test_pax_records(tmp_path) -> None:
    """A path in them takes effect; a size in them is checked against the shard."""
    head = tarfile.TarInfo("plain.jpg")
    head.pax_headers = {"path": "../up.jpg"}
    shard = pack(tmp_path / "x.tar", head, form=tarfile.PAX_FORMAT)
    assert single_reject(shard).reason == "unsafe_path"
    for records in (b"99 path=a\n", b"8 path=a\n", b"x path=a\n", b"0 path=a\n", b"10 size=a\n", b"-5 path=a\n"):
        extended = tarfile.TarInfo("pax")
        extended.type, extended.size = tarfile.XHDTYPE, len(records)
        (tmp_path / "y.tar").write_bytes(extended.tobuf() + records.ljust(512, b"\0") + head.tobuf() + bytes(1024))
        assert single_reject(tmp_path / "y.tar").reason == "bad_record", records


def test_two_media_of_the_same_key(tmp_path) -> None:
    """The bytes may differ: no conversation may get the other's medium."""
    write(tmp_path / "s" / "00000.tar", [sample("7", image(1), "one"), sample("8", image(2)), sample("7", image(3), "two")])
    write(tmp_path / "s" / "00001.tar", [sample("7", image(4), "three")])
    done = pipelines.run(job(tmp_path / "s", tmp_path / "out"))
    assert done.counts == {"read": 4, "written": 2, "samples": 2, "rejected": {"duplicate": 2}}
    (sample_row,) = [row for row in table(tmp_path / "out", "samples") if row["media"][0]["path"] == "7.jpg"]
    assert sample_row["media"][0]["bytes"] == image(1)
    assert sample_row["conversations"][0]["turns"][1]["text"] == "one"


def test_a_medium_is_checked_and_limited(tmp_path) -> None:
    write(tmp_path / "s" / "0.tar", [sample("1", image(1) + bytes(9000)), sample("2", b"text"), sample("3", image(3)[:-60])])
    done = pipelines.run(job(tmp_path / "s", tmp_path / "out", max_media_bytes=9000, validate="full", allow_empty=True))
    assert done.counts["rejected"] == {"corrupt_media": 1, "media_too_large": 1, "unsupported_format": 1}


def test_a_shard_that_shrinks_under_a_worker(tmp_path) -> None:
    shard = write(tmp_path / "0.tar", [sample("1", image(1))])
    (item,) = rows(shard)
    assert isinstance(item, SourceRow)
    assert bytes_of(tmp_path, item) == image(1)
    shard.write_bytes(shard.read_bytes()[: int(item.location.split(":")[1]) + 5])
    with pytest.raises(BadRow, match="corrupt_media"):
        bytes_of(tmp_path, item)
    shard.unlink()
    with pytest.raises(BadRow, match="missing_media"):
        bytes_of(tmp_path, item)


def test_the_listing_identifies_a_folder(tmp_path) -> None:
    two_shards(tmp_path / "s")
    ingest_job = job(tmp_path / "s", tmp_path / "out")
    before = manifest.job_run_id(ingest_job)
    assert manifest.job_run_id(ingest_job) == before
    (tmp_path / "s" / "00000_stats.json").write_text("{ }")
    assert manifest.job_run_id(ingest_job) == before
    shard = tmp_path / "s" / "00001.tar"
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert manifest.job_run_id(ingest_job) != before
    shard.unlink()
    assert manifest.job_run_id(ingest_job) != before
    assert pipelines.run(ingest_job).source[0]["shards"] == 1


def test_refusals(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"inputs.annotations: .*expected a .tar file or a folder with .tar files"):
        pipelines.run(job(tmp_path / "empty", tmp_path / "out"))
    two_shards(tmp_path / "s")
    ingest_job = job(tmp_path / "s", tmp_path / "out2")
    inputs = ingest_job.inputs.model_copy(update={"media": str(tmp_path)})
    with pytest.raises(Refused, match=r"inputs.media: expected nothing: webdataset rows say where their media are"):
        pipelines.run(ingest_job.model_copy(update={"inputs": inputs}))


def test_names_without_a_key_are_webdatasets() -> None:
    for name in ("a.jpg", "b/a.x.jpg", "b.c/a.jpg", "._a.jpg", ".DS_Store", "LICENSE", "b.c/LICENSE", "a."):
        assert has_key(name) == (base_plus_ext(name)[0] is not None), name
    assert base_plus_ext("b/._a.jpg") == ("b/", "_a.jpg")  # webdataset 1.0.2 takes the folder for the key
    assert not any(map(has_key, ["b/._a.jpg", "b/.DS_Store", "__MACOSX/a.jpg", "x/PaxHeaders.12/a.jpg", "PaxHeader/a.jpg"]))


def test_keys_are_webdatasets() -> None:
    assert split_key("a/b.c/000.seg.JPG") == ("a/b.c/000", "seg.jpg")
    assert split_key("000") == ("000", "")


def test_s3_is_as_the_disk(s3_server, tmp_path) -> None:
    two_shards(s3_server / "tars")
    (s3_server / "tarout").mkdir()
    done = pipelines.run(job("s3://tars", "s3://tarout/x", unit_rows=2))
    pipelines.run(job(s3_server / "tars", tmp_path / "out", unit_rows=2))
    assert part_hashes(s3_server / "tarout" / "x") == part_hashes(tmp_path / "out")
    assert done.source[0]["shards"] == 2
    single = pipelines.run(job("s3://tars/00000.tar", "s3://tarout/y"))
    assert single.counts["written"] == 3


@pytest.mark.ray
def test_ray_writes_the_same_bytes(ray_local, tmp_path) -> None:
    two_shards(tmp_path / "s")
    pipelines.run(job(tmp_path / "s", tmp_path / "here", unit_rows=2))
    pipelines.run(job(tmp_path / "s", tmp_path / "ray", workers=2, unit_rows=2, in_process_rows=0))
    assert part_hashes(tmp_path / "ray") == part_hashes(tmp_path / "here")
