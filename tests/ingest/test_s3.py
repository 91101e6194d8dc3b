"""Annotations, media and output in S3, on a real server."""

import hashlib
import json
import threading
import time
import zipfile
from collections import Counter
from random import Random
from typing import Any

import pyarrow as pa
import pytest
import s3_process
from aiobotocore.client import AioBaseClient
from ingest.clips import clip
from ingest.source import good, image, job, part_hashes, row, write

import pipelines
from voco.errors import JobFailed, Refused
from voco.ingest.media.archive import MediaFolder, check_media
from voco.ingest.source_row import BadRow
from voco.run import manifest
from voco.store import parquet, storage
from voco.store.s3 import PatientS3, StorageLost


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
    first = parquet.read_table("s3://out/mix/samples/part-00000.parquet").to_pylist()[0]
    assert hashlib.sha256(first["media"][0]["bytes"]).hexdigest() == first["media"][0]["sha256"]
    storage.delete("s3://out/mix/manifest.json")
    storage.delete("s3://out/mix/units/00001.json")
    assert pipelines.run(job("s3://source", "s3://out/mix", **limits)).tables == done.tables


def test_a_failed_job_has_no_manifest(s3_server) -> None:
    write(s3_server / "poor", [row(1, "gone.jpg", "<image>\nHi", "Ho")], {"a.jpg": image(1)})
    (s3_server / "poorout").mkdir()
    with pytest.raises(JobFailed, match="max_missing_share"):
        pipelines.run(job("s3://poor", "s3://poorout/x"))
    assert manifest.read_manifest("s3://poorout/x") is None
    assert storage.list_names("s3://poorout/x/rejects") == ["part-00000.parquet"]


def test_an_archive_is_read_without_unpacking(s3_server, tmp_path) -> None:
    """Members larger and smaller than what is read ahead, in both methods, absent and damaged ones: the same as from disk."""
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
    for root, output in (("s3://zipped", "s3://zipout/mix"), (str(folder), str(tmp_path / "out"))):
        ingest_job = job(root, output, unit_rows=4, max_missing_share=0.2, max_reject_share=0.2)
        inputs = ingest_job.inputs.model_copy(update={"media": f"{root}/images.zip"})
        done[root] = pipelines.run(ingest_job.model_copy(update={"inputs": inputs}))
    assert part_hashes(s3_server / "zipout" / "mix") == part_hashes(tmp_path / "out")
    assert done["s3://zipped"].counts["rejected"] == {"corrupt_media": 1, "missing_media": 1}
    assert done["s3://zipped"].counts["written"] == 21
    (folder / "no.zip").write_bytes(b"no archive")
    for name in ("no.zip", "gone.zip"):
        with pytest.raises(Refused, match=rf"inputs.media: s3://zipped/{name}: expected a zip archive"):
            check_media(f"s3://zipped/{name}")


def test_archives_in_a_media_folder(s3_server, tmp_path, monkeypatch) -> None:
    """The same as from disk. Folders are listed once; a medium costs one request, in an archive and as an object."""
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
    requests: Counter[str] = Counter()
    call = AioBaseClient._make_api_call

    async def counted(self: AioBaseClient, operation: str, named: dict[str, Any]) -> Any:
        key = str(named.get("Key", named.get("Prefix", "")))
        if named.get("Bucket") == "layered" and key.startswith("images/"):
            requests[f"{operation} {key.removeprefix('images/')}"] += 1
        return await call(self, operation, named)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", counted)
    done = pipelines.run(job("s3://layered", "s3://layeredout/mix", max_missing_share=0.1))
    pipelines.run(job(folder, tmp_path / "out", max_missing_share=0.1))
    assert done.counts == {"read": 13, "written": 12, "samples": 12, "rejected": {"missing_media": 1}}
    assert part_hashes(s3_server / "layeredout" / "mix") == part_hashes(tmp_path / "out")
    absent = [request for request in requests if request.startswith("GetObject gqa/images/")]
    assert len(absent) == 1  # the first read in a folder shows that it does not exist
    once = [*(f"GetObject {path}" for path in loose), *absent, "ListObjectsV2 gqa/", "HeadObject gqa/images.zip"]
    # one check of the media folder before the work and one after it; an archive's directory takes two requests, its members one
    assert requests == {**dict.fromkeys(once, 1), "ListObjectsV2 ": 3, "GetObject gqa/images.zip": 3}
    with pytest.raises(BadRow, match=r"missing_media.*longer than a key in S3 may be"):
        MediaFolder("s3://layered/images").read("coco/" * 300 + "1.jpg", 100)


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


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_finished_job_is_left_alone_and_every_change_is_noticed(s3, tmp_path, where: str) -> None:
    folder = s3.served if where == "s3" else tmp_path
    root = "s3:/" if where == "s3" else str(tmp_path)
    listed, images = good(20, 5)
    write(folder / "noticed", listed, {})
    annotations, archive = folder / "noticed" / "mix.json", folder / "noticed" / "images.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name, data in images.items():
            packed.writestr(name, data)
    (folder / "noticedout").mkdir()

    def run(**changed) -> manifest.Manifest:
        ingest_job = job(f"{root}/noticed", f"{root}/noticedout/mix", unit_rows=3, **changed)
        inputs = ingest_job.inputs.model_copy(update={"media": f"{root}/noticed/images.zip"})
        return pipelines.run(ingest_job.model_copy(update={"inputs": inputs}))

    def states() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "noticedout").rglob("*")}

    done, before = run(), states()
    assert run() == done
    for file in (annotations, archive):
        content = file.read_bytes()
        file.write_bytes(content.replace(b"Question 1", b"Question X") if file == annotations else content[:-1] + b"x")
        with pytest.raises(
            Refused, match=rf"^output: .* holds run {done.run_id}, this job is ingest-test-.*; use another output"
        ):
            run()
        file.write_bytes(content)
        assert run() == done
    with pytest.raises(Refused, match=f"holds run {done.run_id}, this job is"):
        run(split="test")
    assert states() == before


def test_the_server_stops_in_the_middle_of_a_job_and_comes_back(s3, tmp_path, capsys, monkeypatch) -> None:
    """Stopped at the record of unit 2 and restarted when the job reports that it waits: the bytes of an unbroken run."""
    folder = s3.served / "outage"
    listed, images = good(60, 20)
    write(folder, listed, {})
    with zipfile.ZipFile(folder / "images.zip", "w") as packed:
        for name, data in images.items():
            packed.writestr(name, data)
    (s3.served / "outageout").mkdir()
    monkeypatch.setattr("voco.store.s3._last_warning", [float("-inf")])
    outputs = []

    def outage() -> None:
        _until((s3.served / "outageout" / "mix" / "units" / "00002.json").exists)
        s3.stop()
        _until(lambda: "does not answer" in (outputs.append(capsys.readouterr().err) or outputs[-1]))
        s3.start()

    other = threading.Thread(target=outage)
    other.start()
    done = {}
    for root, output in (("s3://outage", "s3://outageout/mix"), (str(folder), str(tmp_path / "out"))):
        ingest_job = job(root, output, unit_rows=2)
        inputs = ingest_job.inputs.model_copy(update={"media": f"{root}/images.zip"})
        done[root] = pipelines.run(ingest_job.model_copy(update={"inputs": inputs}))
        other.join(30)
    shown = "".join(outputs) + capsys.readouterr().err
    assert shown.count("does not answer, waiting up to 180 s") == 1
    assert part_hashes(s3.served / "outageout" / "mix") == part_hashes(tmp_path / "out")
    assert done["s3://outage"].tables == done[str(folder)].tables
    assert done["s3://outage"].counts["written"] == 60


def _until(true) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_that_are_cut_and_answers_that_are_lost(s3, tmp_path, monkeypatch) -> None:
    """Reads end in the middle; the parts of an upload and its completion arrive, but their answers are lost."""
    cuts = {}

    def cut(request: bytes, sent: int) -> bool:
        verb, address, _ = request.split(b"\r\n")[0].decode().split(" ")
        complete = (verb == "GET" and sent < 1 << 16) or (verb == "POST" and "uploadId" not in address) or not cuts.get(verb)
        cuts[verb] = cuts.get(verb, 0) - (not complete)
        return not complete

    (s3.served / "cut").mkdir()
    relay = s3_process.Relay(s3.port, cut)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
    PatientS3.clear_instance_cache()
    data = Random(1).randbytes(33 << 20)
    cuts.update(PUT=1, POST=1)
    with storage.open_write("s3://cut/folder/file") as handle:
        handle.write(data)
    storage.write_bytes("s3://cut/folder/small", data[:1000])
    assert (s3.served / "cut" / "folder" / "file").read_bytes() == data
    cuts.update(GET=1)
    with storage.open_read("s3://cut/folder/file") as handle:
        assert handle.read() == data
    cuts.update(GET=1)
    assert storage.read_bytes("s3://cut/folder/file") == data
    cuts.update(GET=1)
    assert (storage.get_directory("s3://cut/folder", tmp_path / "got") / "file").read_bytes() == data
    table = pa.table({"bytes": pa.array([data[: 1 << 20]] * 2, pa.large_binary())})
    parquet.write_table("s3://cut/table.parquet", [table], table.schema)
    cuts.update(GET=1)
    assert parquet.read_table("s3://cut/table.parquet").equals(table)
    assert not any(cuts.values()), "some cuts did not happen"
    relay.close()
    PatientS3.clear_instance_cache()


def test_what_is_refused_fails_at_once_and_waiting_has_an_end(s3, monkeypatch) -> None:
    (s3.served / "refused").mkdir()
    storage.write_bytes("s3://refused/there", b"1")
    started = time.monotonic()
    for uri in ("s3://refused/none", "s3://nowhere/x"):
        assert not storage.exists(uri)
        for read in (storage.read_bytes, parquet.open_parquet):
            with pytest.raises(FileNotFoundError):
                read(uri)
    with pytest.raises(Refused, match="output: s3://nowhere/x: cannot be written"):
        storage.check_writable("s3://nowhere/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    PatientS3.clear_instance_cache()
    for ask in (storage.exists, parquet.open_parquet):
        with pytest.raises(PermissionError):
            ask("s3://refused/there")
    with pytest.raises(Refused, match="output: s3://refused/x: cannot be written: The request signature"):
        storage.check_writable("s3://refused/x")
    nobody = s3_process.free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody}")
    PatientS3.clear_instance_cache()
    for uri in ("s3://refused/there", "s3://refused"):
        with storage.s3_patience(0), pytest.raises(StorageLost, match=rf"storage http://127.0.0.1:{nobody} did not answer: "):
            storage.exists(uri)
    for read in (
        lambda: check_media("s3://refused/images.zip"),
        lambda: MediaFolder("s3://refused/media").read("a/1.jpg", 9),
        lambda: parquet.open_parquet("s3://refused/part.parquet"),
    ):
        with storage.s3_patience(0), pytest.raises(StorageLost):  # neither a bad archive nor a missing file
            read()
    with storage.s3_patience(0.5), pytest.raises(StorageLost, match="did not answer for 1 s: EndpointConnectionError"):
        storage.write_bytes("s3://refused/x", b"1")
    assert time.monotonic() - started < storage.PATIENCE_S / 3
    PatientS3.clear_instance_cache()


def test_a_folder_with_more_names_than_fit_into_an_answer(s3) -> None:
    folder = s3.served / "many" / "units"
    folder.mkdir(parents=True)
    expected = [f"{unit:05d}.json" for unit in range(1100)]
    for name in [*expected, ".hidden"]:
        (folder / name).write_bytes(b"{}")
    assert storage.list_names("s3://many/units") == expected
    (folder / expected[0]).unlink()
    assert storage.list_names("s3://many/units") == expected[1:]  # listings are not cached
