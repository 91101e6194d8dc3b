"""Annotations, media and output in S3, on a real server."""

import hashlib
import json
import zipfile
from collections import Counter
from typing import Any

import pytest
from aiobotocore.client import AioBaseClient
from ingest.clips import clip
from ingest.source import good, image, job, part_hashes, row, write

import pipelines
from voco import manifest, rows, storage
from voco.errors import JobFailed, Refused
from voco.ingest.archive import check_media


def test_round_trip_is_byte_equal_to_disk(s3_server, tmp_path) -> None:
    listed, images = good(20, 5)
    listed += [row(1, "gone.jpg", "<image>\nHi", "Ho"), row(2, "text.jpg", "<image>\nHi", "Ho"), 5]
    images["text.jpg"] = b"no image"
    write(s3_server / "source", listed, images)
    limits = {"unit_rows": 3, "max_missing_share": 0.2, "max_reject_share": 0.2}
    (s3_server / "out").mkdir()
    done = pipelines.run(job("s3://source", "s3://out/mix", **limits))
    pipelines.run(job(s3_server / "source", tmp_path / "out", **limits))
    assert part_hashes(s3_server / "out" / "mix") == part_hashes(tmp_path / "out")
    assert done.counts["rejected"] == {"bad_record": 1, "missing_media": 1, "unsupported_format": 1}
    assert done.source[0]["etag"]
    assert done.source[0]["uri"] == "s3://source/mix.json"
    first = rows.read_table("s3://out/mix/samples/part-00000.parquet").to_pylist()[0]
    assert hashlib.sha256(first["media"][0]["bytes"]).hexdigest() == first["media"][0]["sha256"]
    storage.delete("s3://out/mix/manifest.json")
    storage.delete("s3://out/mix/units/00001.json")
    assert pipelines.run(job("s3://source", "s3://out/mix", **limits)).tables == done.tables


def test_a_failed_job_has_no_manifest(s3_server) -> None:
    write(s3_server / "poor", [row(1, "gone.jpg", "<image>\nHi", "Ho")], {"a.jpg": image(1)})
    (s3_server / "poorout").mkdir()
    with pytest.raises(JobFailed, match="max_missing_share"):
        pipelines.run(job("s3://poor", "s3://poorout/x"))
    assert manifest.read("s3://poorout/x") is None
    assert storage.names("s3://poorout/x/rejects") == ["part-00000.parquet"]


def test_an_archive_is_read_in_place(s3_server, tmp_path) -> None:
    """Members larger and smaller than what is read ahead, in both methods, absent and damaged ones: as from the disk."""
    listed, images = good(20, 5)
    images["large.png"] = image(9, "PNG", (700, 500)) + bytes(200_000)
    listed += [
        row(1, "gone.jpg", "<image>\nHi", "Ho"),
        row(2, "large.png", "<image>\nHi", "Ho"),
        row(3, "cut.jpg", "<image>\nHi", "Ho"),
    ]
    folder = s3_server / "zipped"
    write(folder, listed, {})
    with zipfile.ZipFile(folder / "images.zip", "w") as packed:
        for index, (name, data) in enumerate(images.items()):
            packed.writestr(name, data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[index % 2])
        packed.writestr("cut.jpg", image(7) + b"damaged here")
    raw = (folder / "images.zip").read_bytes().replace(b"damaged here", b"damaged HERE")
    (folder / "images.zip").write_bytes(raw)
    (s3_server / "zipout").mkdir()
    done = {}
    for place, output in (("s3://zipped", "s3://zipout/mix"), (str(folder), str(tmp_path / "out"))):
        asked = job(place, output, unit_rows=4, max_missing_share=0.2, max_reject_share=0.2)
        inputs = asked.inputs.model_copy(update={"media": f"{place}/images.zip"})
        done[place] = pipelines.run(asked.model_copy(update={"inputs": inputs}))
    assert part_hashes(s3_server / "zipout" / "mix") == part_hashes(tmp_path / "out")
    assert done["s3://zipped"].counts["rejected"] == {"corrupt_media": 1, "missing_media": 1}
    assert done["s3://zipped"].counts["written"] == 21
    (folder / "no.zip").write_bytes(b"no archive")
    for name in ("no.zip", "gone.zip"):
        with pytest.raises(Refused, match=rf"inputs.media: s3://zipped/{name}: expected a zip archive"):
            check_media(f"s3://zipped/{name}")


def test_archives_in_a_media_folder(s3_server, tmp_path, monkeypatch) -> None:
    """As from the disk; folders are listed once, and a medium costs one request in an archive and two as an object."""
    folder = s3_server / "layered"
    images = {f"gqa/images/{index}.jpg": image(index) for index in range(6)}
    loose = {f"coco/train2017/{index}.jpg": image(10 + index) for index in range(6)}
    listed = [row(index, path, "<image>\nHi", "Ho") for index, path in enumerate([*loose, *images, "gqa/images/9.jpg"])]
    write(folder, listed, loose)
    (folder / "images" / "gqa").mkdir()
    with zipfile.ZipFile(folder / "images" / "gqa" / "images.zip", "w") as packed:
        for path, data in images.items():
            packed.writestr(path.removeprefix("gqa/"), data)
    (s3_server / "layeredout").mkdir()
    asked: Counter[str] = Counter()
    call = AioBaseClient._make_api_call

    async def counted(self: AioBaseClient, operation: str, named: dict[str, Any]) -> Any:
        key = str(named.get("Key", named.get("Prefix", "")))
        if named.get("Bucket") == "layered" and key.startswith("images/"):
            asked[f"{operation} {key.removeprefix('images/')}"] += 1
        return await call(self, operation, named)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", counted)
    done = pipelines.run(job("s3://layered", "s3://layeredout/mix", max_missing_share=0.1))
    pipelines.run(job(folder, tmp_path / "out", max_missing_share=0.1))
    assert done.counts == {"read": 13, "written": 12, "samples": 12, "rejected": {"missing_media": 1}}
    assert part_hashes(s3_server / "layeredout" / "mix") == part_hashes(tmp_path / "out")
    once = [f"{operation} {path}" for operation in ("HeadObject", "GetObject") for path in loose]
    once += ["HeadObject gqa/images/0.jpg", "ListObjectsV2 gqa/images/0.jpg/"]  # absent, and no folder; then it is known
    once += ["ListObjectsV2 gqa/", "HeadObject gqa/images.zip"]
    # the manifest looks once whether there is a folder of media; an archive's directory takes two requests
    assert asked == {**dict.fromkeys(once, 1), "ListObjectsV2 ": 2, "GetObject gqa/images.zip": 2 + len(images)}


def test_videos_with_any_extension(s3_server) -> None:
    folder = s3_server / "videos"
    (folder / "images").mkdir(parents=True)
    for name, data in {"v_a.mp4": clip(), "v_b.webm": clip("webm")}.items():
        (folder / "images" / name).write_bytes(data)
    listed = [{"q": f"What {index}?", "a": "A bar", "video_id": f"v_{name}"} for index, name in enumerate("aabc")]
    (folder / "mix.json").write_text(json.dumps(listed))
    (s3_server / "videoout").mkdir()
    done = pipelines.run(job("s3://videos", "s3://videoout/x", format="video_chatgpt"))
    assert done.counts == {"read": 4, "written": 3, "samples": 2, "rejected": {"missing_media": 1}}
