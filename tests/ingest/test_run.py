"""The complete stage in this process: accounting, tables, limits, and resuming after a kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ingest.source import good, image, job, part_hashes, row, table, write

import pipelines
from voco.errors import JobFailed, Refused
from voco.ingest import listing
from voco.run import manifest, units
from voco.store import schemas
from voco.store.samples import medium_bytes

LAX = {"max_missing_share": 1.0, "max_reject_share": 1.0}


def test_golden_sample_row(tmp_path) -> None:
    listed = [
        {**row(1, "a/one.gif", "<image>\nWhat is it?\nOne word.", "A cat"), "category": "animals", "level": 2},
        row("t", None, "Hi", "Ho"),
        row(1, "a//one.gif", "And its colour?\n<image>", "Grey", "Sure?", "Yes"),
    ]
    data = image(5, "PNG")
    write(tmp_path, listed, {"a/one.gif": data})
    done = pipelines.run(job(tmp_path, tmp_path / "out"))
    first, second = table(tmp_path / "out", "samples")
    assert first == {
        "sample_id": hashlib.sha256(b'["mix","train",["a/one.gif"]]').hexdigest()[:32],
        "dataset": "mix",
        "split": "train",
        "modality": "image",
        "media": [
            {
                "bytes": data, "path": "a/one.gif", "format": "png", "sha256": hashlib.sha256(data).hexdigest(),
                "width": 48, "height": 32, "duration_s": None, "fps": None, "num_frames": None,
            }
        ],
        "conversations": [
            {
                "source_id": "1",
                "turns": [{"role": "user", "text": "What is it?\nOne word."}, {"role": "assistant", "text": "A cat"}],
                "placeholder": "before", "answers": [], "choices": [], "category": "animals", "extra": '{"level":2}',
            },
            {
                "source_id": "1",
                "turns": [
                    {"role": "user", "text": "And its colour?"}, {"role": "assistant", "text": "Grey"},
                    {"role": "user", "text": "Sure?"}, {"role": "assistant", "text": "Yes"},
                ],
                "placeholder": "after", "answers": [], "choices": [], "category": "", "extra": "{}",
            },
        ],
    }  # fmt: skip
    assert (second["modality"], second["media"]) == ("text", [])
    assert done.counts == {"read": 3, "written": 3, "samples": 2, "rejected": {}}
    assert done.statistics["figures"]["conversations"]["max"] == 2
    assert done.statistics["kinds"] == {"format.png": 1, "modality.image": 1, "modality.text": 1}
    file = pq.ParquetFile(tmp_path / "out" / "samples" / "part-00000.parquet")
    assert file.schema_arrow.remove_metadata().equals(schemas.SAMPLES)
    assert file.schema_arrow.metadata[b"voco.schema_version"] == b"1"


def test_every_reason_is_counted(tmp_path) -> None:
    """Rows that fail in the listing and rows that fail by their medium, among good ones; every number adds up."""
    listed, images = good(40, 8)
    big = image(3, "JPEG", (300, 300))
    images |= {
        "cut.jpg": image(1, "JPEG", (96, 96))[:900], "text.jpg": b"not an image", "wide.png": image(2, "PNG", (400, 30)),
        "big.jpg": big, "empty.jpg": b"", "cut.png": image(1, "PNG")[:-20],
    }  # fmt: skip
    failing = {
        "gone.jpg": "missing_media", "set": "missing_media", "link.jpg": "unsafe_path", "cut.jpg": "corrupt_media",
        "cut.png": "corrupt_media", "empty.jpg": "corrupt_media", "text.jpg": "unsupported_format",
        "wide.png": "media_too_large", "big.jpg": "media_too_large", "../mix.json": "unsafe_path", "/etc/passwd": "unsafe_path",
    }  # fmt: skip
    expected = Counter[str]()
    for path, reason in failing.items():
        for turn in range(3):  # each source row of a failed medium is one reject
            listed.append(row(path, path, f"<image>\n{turn}?", "Yes"))
            expected[reason] += 1
    for bad, reason in (
        (7, "bad_record"), (row(1, None, "Hi"), "bad_conversation"), (row(1, None, "Hi", ""), "empty_text"),
        (row(1, None, "Hi", "y" * 60_000), "text_too_large"),
        ({**row(1, "a.jpg", "Hi", "Ho"), "video": "v.mp4"}, "unsupported_format"),
        (listed[0], "duplicate"), ({**listed[9], "id": "again"}, "duplicate"), (None, "bad_record"),
    ):  # fmt: skip
        listed.append(bad)
        expected[reason] += 1
    write(tmp_path, listed, images)
    (tmp_path / "images" / "link.jpg").symlink_to("/etc/passwd")
    limits = {"max_pixels": 9500, "max_media_bytes": len(big) - 1, "max_text_bytes": 50_000}
    done = pipelines.run(job(tmp_path, tmp_path / "out", unit_rows=3, **limits, **LAX))
    assert done.counts["rejected"] == dict(expected)
    assert done.counts["read"] == len(listed) == done.counts["written"] + expected.total()
    rejects = table(tmp_path / "out", "rejects")
    assert Counter(reject["reason"] for reject in rejects) == expected
    assert {reject["reason"] for reject in rejects} <= set(schemas.REASONS)
    samples = table(tmp_path / "out", "samples")
    assert sum(len(sample["conversations"]) for sample in samples) == 40
    assert len({reject["source"] for reject in rejects}) == expected.total()  # each is of another source row
    for reject in rejects:
        index = int(reject["source"].removeprefix("mix.json:"))
        assert index >= 40
    for name in ("samples", "rejects"):
        for entry in done.tables[name]:
            part = tmp_path / "out" / name / entry["path"]
            assert (hashlib.sha256(part.read_bytes()).hexdigest(), part.stat().st_size) == (entry["sha256"], entry["bytes"])
        assert sum(entry["rows"] for entry in done.tables[name]) == len(table(tmp_path / "out", name))


def test_duplicates_can_be_kept(tmp_path) -> None:
    listed, images = good(20, 4)
    write(tmp_path, listed + listed, images)
    done = pipelines.run(job(tmp_path, tmp_path / "out", duplicates="keep"))
    assert done.counts == {"read": 40, "written": 40, "samples": 6, "rejected": {}}


def test_row_groups_have_at_most_eight_mebibytes_or_a_single_row(tmp_path) -> None:
    noise = [os.urandom(3 << 20) for _ in range(5)] + [os.urandom(9 << 20)]
    images = {f"{index}.jpg": image(index) + tail for index, tail in enumerate(noise)}  # bytes after the end are no fault
    write(tmp_path, [row(index, f"{index}.jpg", "<image>\nHi", "Ho") for index in range(6)], images)
    pipelines.run(job(tmp_path, tmp_path / "out"))
    file = pq.ParquetFile(tmp_path / "out" / "samples" / "part-00000.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [2, 2, 1, 1]


def test_a_unit_with_much_in_it_writes_several_parts(tmp_path) -> None:
    """About `shard_bytes` of media each, in the list's order by name. Parts of an earlier, larger attempt are deleted."""
    images = {f"{index}.jpg": image(index) + os.urandom(3 << 20) for index in range(8)}
    write(tmp_path, [row(index, f"{index}.jpg", "<image>\nHi", "Ho") for index in range(8)], images)
    ingest_job = job(tmp_path, tmp_path / "out", shard_bytes=13 << 20, unit_rows=6, max_missing_share=1.0)
    done = pipelines.run(ingest_job)
    names = ["part-00000.parquet", "part-00000_001.parquet", "part-00001.parquet"]
    assert [(entry["path"], entry["rows"]) for entry in done.tables["samples"]] == list(zip(names, (4, 2, 2), strict=True))
    assert [path.name for path in sorted((tmp_path / "out" / "samples").iterdir())] == names
    assert [sample["media"][0]["path"] for sample in table(tmp_path / "out", "samples")] == list(images)
    for index in range(4):
        (tmp_path / "images" / f"{index}.jpg").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "units" / "00000.json").unlink()
    assert [entry["path"] for entry in pipelines.run(ingest_job).tables["samples"]] == [names[0], names[2]]
    assert [path.name for path in sorted((tmp_path / "out" / "samples").iterdir())] == [names[0], names[2]]


def test_a_medium_that_is_too_large_for_a_table_lies_beside_it(tmp_path) -> None:
    small, large = image(1), image(2) + os.urandom(5000)
    write(tmp_path, [row(i, f"{i}.jpg", "<image>\nHi", "Ho") for i in range(2)], {"0.jpg": small, "1.jpg": large})
    done = pipelines.run(job(tmp_path, tmp_path / "out", inline_max_bytes=5000))
    first, second = (sample["media"][0] for sample in table(tmp_path / "out", "samples"))
    name = hashlib.sha256(large).hexdigest()
    assert (second["bytes"], second["sha256"], second["width"]) == (None, name, 48)
    assert (tmp_path / "out" / "blobs" / name).read_bytes() == large
    assert done.tables["blobs"] == [{"path": name, "rows": 1, "bytes": len(large), "sha256": name}]
    assert done.statistics["figures"]["media_bytes"]["max"] == len(large)
    part = str(tmp_path / "out" / "samples" / "part-00000.parquet")
    assert [medium_bytes(medium, part) for medium in (first, second)] == [small, large]


@pytest.mark.parametrize(
    ("limit", "path", "share"), [("max_missing_share", "gone.jpg", 0.02), ("max_reject_share", "text.jpg", 0.01)]
)
def test_a_job_that_loses_too_much_fails_and_continues_after_a_repair(tmp_path, limit: str, path: str, share: float) -> None:
    listed, images = good(96, 8)
    lost = [row(index, path, f"<image>\n{index}?", "Yes") for index in range(4)]
    write(tmp_path, listed + lost, {**images, "text.jpg": b"no image"})
    ingest_job = job(tmp_path, tmp_path / "out", unit_rows=5)
    with pytest.raises(JobFailed, match=rf"ingest.{limit}: 4 of 100 rows \(4.00%\)"):
        pipelines.run(ingest_job)
    assert manifest.read_manifest(str(tmp_path / "out")) is None
    assert len(table(tmp_path / "out", "rejects")) == 4
    (tmp_path / "images" / path).write_bytes(image(200))
    assert pipelines.run(ingest_job).counts == {"read": 100, "written": 100, "samples": 18, "rejected": {}}
    assert table(tmp_path / "out", "rejects") == []
    allowed = job(tmp_path, tmp_path / "other", **{limit: share * 4})
    (tmp_path / "images" / path).write_bytes(b"no image") if path == "text.jpg" else (tmp_path / "images" / path).unlink()
    assert pipelines.run(allowed).counts["written"] == 96


def test_a_missing_media_input_rejects_image_rows_only(tmp_path) -> None:
    listed, images = good(20, 4)
    write(tmp_path, listed, images)
    ingest_job = job(tmp_path, tmp_path / "out", **LAX)
    ingest_job = ingest_job.model_copy(update={"inputs": ingest_job.inputs.model_copy(update={"media": None})})
    assert pipelines.run(ingest_job).counts["rejected"] == {"missing_media": 18}


def test_an_empty_list_and_a_broken_file(tmp_path) -> None:
    write(tmp_path, [], {})
    with pytest.raises(JobFailed, match=r"nothing was written .*: the source has no row; `ingest.allow_empty: true` accepts"):
        pipelines.run(job(tmp_path, tmp_path / "out"))
    allowed = job(tmp_path, tmp_path / "out", allow_empty=True)
    assert pipelines.run(allowed).counts == {"read": 0, "written": 0, "samples": 0, "rejected": {}}
    (tmp_path / "mix.json").write_text("[{}")
    with pytest.raises(Refused, match="expected complete JSON"):
        pipelines.run(job(tmp_path, tmp_path / "other"))
    assert not units.is_listed(str(tmp_path / "other"))


def test_grouping_by_many_buckets_keeps_every_row(tmp_path, monkeypatch) -> None:
    """One bucket and many give the same samples in another order; many give the same order every time."""
    listed, images = good(300, 40)
    write(tmp_path, listed, images)
    pipelines.run(job(tmp_path, tmp_path / "one"))
    monkeypatch.setattr(listing, "BUCKET_BYTES", 3000)
    for name in ("many", "again"):
        pipelines.run(job(tmp_path, tmp_path / name, unit_rows=7))
    single, many = table(tmp_path / "one", "samples"), table(tmp_path / "many", "samples")
    assert single != many
    assert sorted(single, key=str) == sorted(many, key=str)
    assert part_hashes(tmp_path / "many") == part_hashes(tmp_path / "again")


def mixed(folder: Path) -> None:
    """A source of 400 rows in which some media and some rows are bad."""
    listed, images = good(400, 60)
    listed[7:7] = [row(1, "gone.jpg", "<image>\nHi", "Ho"), 3, row(2, "text.jpg", "<image>\nHi", "Ho")]
    write(folder, listed, {**images, "text.jpg": b"no image"})


def test_a_lost_unit_is_written_again_with_the_same_bytes(tmp_path) -> None:
    mixed(tmp_path)
    ingest_job = job(tmp_path, tmp_path / "out", unit_rows=10, **LAX)
    pipelines.run(ingest_job)
    before = part_hashes(tmp_path / "out")
    assert len(before) > 10
    (tmp_path / "out" / "manifest.json").unlink()
    for unit in (0, 4):
        (tmp_path / "out" / "units" / f"{unit:05d}.json").unlink()
        (tmp_path / "out" / "samples" / f"part-{unit:05d}.parquet").write_bytes(b"half a part")
    modified = (tmp_path / "out" / "samples" / "part-00002.parquet").stat().st_mtime_ns
    pipelines.run(ingest_job)
    assert part_hashes(tmp_path / "out") == before
    assert (tmp_path / "out" / "samples" / "part-00002.parquet").stat().st_mtime_ns == modified  # a done unit is not touched


CHILD = """
import json, sys, time
import pipelines
from voco.job.load import build_job
from voco.ingest import listing, write_samples
stage = sys.argv[2]
def slow(kind, name):
    original = getattr(kind, name)
    def late(*arguments):
        time.sleep(0.15)
        return original(*arguments)
    setattr(kind, name, late)
if stage == "units":
    slow(write_samples.WriteSamples, "_write")
if stage == "listing":
    parse = listing.sample_id
    def late(*arguments):
        open(sys.argv[3], "w").close()
        time.sleep(0.005)
        return parse(*arguments)
    listing.sample_id = late
pipelines.run(build_job("test.yaml", json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("stage", ["listing", "units"])
def test_killed_and_run_again_is_byte_equal(tmp_path, stage: str) -> None:
    """SIGKILL of the driver process while it lists, or between units; the next run ends with the unbroken run's bytes."""
    mixed(tmp_path)
    pipelines.run(job(tmp_path, tmp_path / "whole", unit_rows=10, **LAX))
    ingest_job = job(tmp_path, tmp_path / "out", unit_rows=10, **LAX)
    listing, unit_folder = tmp_path / "begun", tmp_path / "out" / "units"
    command = [sys.executable, "-c", CHILD, json.dumps(ingest_job.model_dump(exclude_none=True)), stage, str(listing)]
    child = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if listing.exists() if stage == "listing" else len(list(unit_folder.glob("*.json"))) >= 3:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = len(list(unit_folder.glob("*.json")))
    assert (done == 0) if stage == "listing" else 3 <= done < 10
    assert units.is_listed(str(tmp_path / "out")) == (stage == "units")
    pipelines.run(ingest_job)
    assert part_hashes(tmp_path / "out") == part_hashes(tmp_path / "whole")
    names = {"index", "list-00000.parquet", "list.json", "listing.json"}
    assert {path.name for path in (tmp_path / "out" / "work").iterdir()} == names
    assert pipelines.run(ingest_job) == manifest.read_manifest(str(tmp_path / "out"))  # done already


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch) -> None:
    mixed(tmp_path)
    original = listing.sample_id

    def changing(*arguments):
        (tmp_path / "mix.json").write_text("[]")
        return original(*arguments)

    monkeypatch.setattr(listing, "sample_id", changing)
    with pytest.raises(JobFailed, match="ingest-test: its source changed while it was read"):
        pipelines.run(job(tmp_path, tmp_path / "out", **LAX))
    assert manifest.read_manifest(str(tmp_path / "out")) is None


def test_the_columns_of_the_work_list_stay() -> None:
    """An output that is unfinished when the package is upgraded continues with the list that it has."""
    columns = ["sample_id", "dataset", "split", "modality", "paths", "place", "sources", "conversations"]
    assert listing.WORK.names == columns


def test_the_driver_leaves_ray_alone(tmp_path) -> None:
    mixed(tmp_path)
    raw_job = json.dumps(job(tmp_path, tmp_path / "out", unit_rows=50, **LAX).model_dump(exclude_none=True))
    code = CHILD + "\nassert 'ray' not in sys.modules and 'torch' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code, raw_job, "nowhere"], check=True, capture_output=True)
