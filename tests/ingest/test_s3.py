"""Annotations, media and output in S3, on a real server."""

import hashlib

import pytest
from ingest.source import good, image, job, part_hashes, row, write

import pipelines
from voco import manifest, rows, storage
from voco.errors import JobFailed


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
