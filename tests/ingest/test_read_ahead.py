"""Media from S3 are read ahead: the same media in the same order as one at a time, in bounded memory, without threads left."""

from __future__ import annotations

import io
import json
import random
import threading
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import s3_process
from ingest import shards
from ingest.clips import clip
from ingest.source import good, image, job, part_hashes, row, write
from ingest.test_mmbench_tsv import row as tsv_row
from ingest.test_mmbench_tsv import write as write_tsv

import pipelines
from voco.ingest.formats import mmbench_tsv
from voco.ingest.media import read_ahead
from voco.ingest.media.archive import MediaFolder, ZipArchive
from voco.ingest.media.block_reader import BlockReader
from voco.ingest.media.read_ahead import Find, Medium
from voco.ingest.media.source import TooLarge, check_size
from voco.ingest.media.span import GAP_BYTES, Span, joined
from voco.ingest.source_row import BadRow
from voco.job.config import Ingest
from voco.store import storage
from voco.store.s3 import PatientS3, StorageLost


def media_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("media")]


def outcome(read: Callable[[], Medium]) -> Medium | str:
    try:
        return read()
    except BadRow as bad:
        return f"{bad.reason}: {bad.detail}"


def medium(number: int, size: int, limit: int) -> Medium:
    """A medium that takes longer the earlier it is; every seventh is missing."""
    time.sleep((number % 5) / 500)
    if number % 7 == 3:
        raise BadRow("missing_media", str(number))
    check_size(str(number), size, limit)
    return str(number), bytes([number % 256]) * size


def test_media_and_faults_in_order_whatever_their_sizes(monkeypatch) -> None:
    """Most are larger than what a first request takes, some larger than the window, some than the limit."""
    monkeypatch.setattr(read_ahead, "WINDOW_BYTES", 100_000)
    monkeypatch.setattr(read_ahead, "SMALL_BYTES", 1000)
    sizes = [random.Random(number).choice((10, 900, 5000, 40_000, 150_000, 300_000)) for number in range(300)]
    finds = [partial(medium, number, size) for number, size in enumerate(sizes)]
    limit = 200_000
    expected = [outcome(partial(find, limit)) for find in finds]
    assert [outcome(read) for read in read_ahead.read_ahead(finds, limit)] == expected
    assert sum(isinstance(read, str) and "more than ingest.max_media_bytes 200000" in read for read in expected) > 20
    assert not media_threads()


def test_memory_is_the_window_and_the_medium_whose_turn_it_is(monkeypatch) -> None:
    window, largest = 1_000_000, 300_000
    monkeypatch.setattr(read_ahead, "WINDOW_BYTES", window)
    monkeypatch.setattr(read_ahead, "SMALL_BYTES", 10_000)
    lock, waiting, peak = threading.Lock(), [0], [0]

    def find(size: int, limit: int) -> Medium:
        check_size("x", size, limit)
        with lock:
            waiting[0] += size
            peak[0] = max(peak[0], waiting[0])
        return "x", bytes(size)

    sizes = [largest if number % 3 else 5000 for number in range(200)]
    for read in read_ahead.read_ahead([partial(find, size) for size in sizes], 1 << 30):
        time.sleep(0.002)
        data = read()[1]
        with lock:
            waiting[0] -= len(data)
    assert window / 2 < peak[0] <= window + largest  # used, and kept


def test_reads_are_at_the_same_time_and_bounded_in_number() -> None:
    started: list[int] = []
    begin = threading.Event()

    def find(number: int, limit: int) -> Medium:
        started.append(number)
        begin.wait(10)
        return str(number), b""

    reads = read_ahead.read_ahead((partial(find, number) for number in range(1000)), 100)
    first = next(reads)
    deadline = time.monotonic() + 10
    while len(started) < read_ahead.READS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) == read_ahead.READS
    begin.set()
    assert first() == ("0", b"")
    time.sleep(0.1)
    assert len(started) <= read_ahead.WAITING + 1  # nothing was taken
    reads.close()
    assert not media_threads()


@pytest.mark.parametrize("how", ["close", "exception"])
def test_no_thread_is_left(how: str) -> None:
    """Some wait for room in the window, some are being read, some have not begun."""

    def find(number: int, limit: int) -> Medium:
        time.sleep(0.01)
        check_size("x", read_ahead.WINDOW_BYTES, limit)
        if number == 5:
            raise OSError("the disk is gone")
        return "x", b"x"

    reads = read_ahead.read_ahead((partial(find, number) for number in range(500)), 1 << 30)
    if how == "close":
        assert next(reads)() == ("x", b"x")
        assert media_threads()
        reads.close()
    else:
        read = (read() for read in reads)
        assert [next(read) for _ in range(5)] == [("x", b"x")] * 5
        with pytest.raises(OSError, match="the disk is gone"):
            next(read)
        reads.close()
    assert not media_threads()


def test_ranges_that_lie_close_together_are_joined() -> None:
    ranges = [("a", 512, 100), ("a", 1536, 100), ("a", 1600, 300), ("a", 100, 5), ("b", 110, 5), ("b", 115 + GAP_BYTES, 5)]
    ranges += [("b", 121 + 2 * GAP_BYTES, 5), ("c", 0, 5_000_000), ("c", 5_000_000, 10)]
    assert list(joined(ranges)) == [
        ("a", [(512, 100), (1536, 100), (1600, 300)]),
        ("a", [(100, 5)]),  # it lies before the last one
        ("b", [(110, 5), (115 + GAP_BYTES, 5)]),
        ("b", [(121 + 2 * GAP_BYTES, 5)]),  # a byte too far
        ("c", [(0, 5_000_000)]),
        ("c", [(5_000_000, 10)]),
    ]
    assert [len(run) for _, run in joined([("a", 10 * index, 10) for index in range(10)], 45)] == [4, 4, 2]
    assert list(joined([])) == []


def test_a_span_is_read_once() -> None:
    data, requests = bytes(range(256)), []

    def read_at(start: int, size: int) -> bytes:
        requests.append((start, size))
        return data[start : start + size]

    span = Span(read_at, [(10, 5), (20, 100), (250, 10)])
    assert [span.read(20, 100), span.read(10, 5), span.read(250, 10)] == [data[20:120], data[10:15], data[250:]]
    assert requests == [(10, 250)]


class Counted:
    """A relay in front of the S3 server that counts requests by method, and the most bytes of an answer."""

    def __init__(self, port: int) -> None:
        self.lock = threading.Lock()
        self.requests: list[str] = []
        self.most_bytes = 0
        self.relay = s3_process.Relay(port, self.count)

    def count(self, request: bytes, sent: int) -> bool:
        with self.lock:
            if sent == 0:
                self.requests.append(request.split(b" HTTP", 1)[0].decode())
            self.most_bytes = max(self.most_bytes, sent)
        return False

    def of(self, text: str) -> list[str]:
        return [request for request in self.requests if text in request]


@pytest.fixture
def counted(s3, monkeypatch) -> Counted:
    counter = Counted(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{counter.relay.port}")
    PatientS3.clear_instance_cache()
    yield counter
    counter.relay.close()
    PatientS3.clear_instance_cache()


def test_an_object_that_is_too_large_is_not_downloaded(s3, counted) -> None:
    (s3.served / "large").mkdir()
    with (s3.served / "large" / "a.jpg").open("wb") as file:
        file.truncate(256 << 20)
    (s3.served / "large" / "b.jpg").write_bytes(b"12345")
    (s3.served / "large" / "empty.jpg").write_bytes(b"")
    folder = MediaFolder("s3://large")
    with pytest.raises(TooLarge, match=r"a\.jpg: 268435456 bytes, more than ingest\.max_media_bytes 1000") as caught:
        folder.read("a.jpg", 1000)
    assert caught.value.size == 256 << 20
    assert folder.read("b.jpg", 5) == b"12345"
    assert folder.read("empty.jpg", 5) == b""
    with pytest.raises(TooLarge):
        folder.read("b.jpg", 4)
    assert counted.most_bytes < 64 << 20  # what the sockets between server, relay and client had room for
    assert {request.split(" ")[0] for request in counted.requests} == {"GET"}


@pytest.mark.parametrize("window", [read_ahead.WINDOW_BYTES, 20_000])
def test_a_job_is_byte_equal_to_one_from_disk(s3, tmp_path, monkeypatch, window: int) -> None:
    """With faults, videos without an extension, blobs, and a window that is too small for most media."""
    monkeypatch.setattr(read_ahead, "WINDOW_BYTES", window)
    monkeypatch.setattr(read_ahead, "SMALL_BYTES", min(read_ahead.SMALL_BYTES, window // 10))
    folder = s3.served / f"equal{window}"
    listed, images = good(150, 60)
    images |= {f"set/{index:03d}.jpg": image(index, "PNG", (120, 40 + index)) for index in range(0, 60, 7)}
    images["set/011.jpg"] = b"no image"
    del images["set/012.jpg"]
    listed.insert(3, row(1, "else/gone.jpg", "<image>\nHi", "Ho"))
    write(folder, listed, images)
    sizes = sorted(len(data) for data in images.values())
    lax = {"max_missing_share": 0.2, "max_reject_share": 0.5, "unit_rows": 40}
    lax |= {"inline_max_bytes": sizes[40], "max_media_bytes": sizes[52]}
    (s3.served / f"equal{window}out").mkdir()
    stored, local = s3.served / f"equal{window}out" / "x", tmp_path / "out"
    done = pipelines.run(job(f"s3://equal{window}", f"s3://equal{window}out/x", **lax))
    assert set(done.counts["rejected"]) == {"missing_media", "media_too_large", "unsupported_format"}
    pipelines.run(job(folder, local, **lax))
    assert part_hashes(stored) == part_hashes(local)
    blobs = {path.name: path.read_bytes() for path in (local / "blobs").iterdir()}
    assert len(blobs) > 3
    assert {path.name: path.read_bytes() for path in (stored / "blobs").iterdir()} == blobs
    assert not media_threads()


def test_videos_are_byte_equal_to_those_from_disk(s3, tmp_path) -> None:
    folder = s3.served / "clips"
    (folder / "images").mkdir(parents=True)
    for index in range(12):
        name = f"v_{index}.{('mp4', 'webm', 'mkv')[index % 3]}"
        (folder / "images" / name).write_bytes(clip(("mp4", "webm", "matroska")[index % 3], seed=index))
    listed = [{"q": f"What {index}?", "a": "A bar", "video_id": f"v_{index % 13}"} for index in range(26)]
    (folder / "mix.json").write_text(json.dumps(listed))
    (s3.served / "clipsout").mkdir()
    pipelines.run(job("s3://clips", "s3://clipsout/x", format="video_chatgpt"))
    pipelines.run(job(folder, tmp_path / "out", format="video_chatgpt"))
    assert part_hashes(s3.served / "clipsout" / "x") == part_hashes(tmp_path / "out")
    assert {"samples/part-00000.parquet", "rejects/part-00000.parquet"} <= set(part_hashes(tmp_path / "out"))


def test_members_of_a_shard_are_read_together(s3, counted, tmp_path) -> None:
    """40 images of 1 kB lie in a run: one request reads them."""
    (s3.served / "tars").mkdir()
    for shard in range(2):
        samples = [shards.sample(f"{shard}{index:03d}", image(40 * shard + index)) for index in range(40)]
        shards.write(s3.served / "tars" / "in" / f"{shard:05d}.tar", samples)
    pipelines.run(shards.job("s3://tars/in", "s3://tars/out"))
    pipelines.run(shards.job(s3.served / "tars" / "in", tmp_path / "out"))
    assert part_hashes(s3.served / "tars" / "out") == part_hashes(tmp_path / "out")
    ranged = counted.of("GET /tars/in/0")
    assert len(ranged) == 4  # each shard: its headers, then its members


def test_a_file_is_read_in_blocks_ahead(s3, counted) -> None:
    """Every byte wherever it is read; from start to end each block once and several at a time; a jump reads a single block."""
    data = random.Random(4).randbytes((40 << 20) + 77)
    (s3.served / "blocks").mkdir()
    (s3.served / "blocks" / "x").write_bytes(data)
    fs, path = storage.filesystem("s3://blocks/x")

    def reads() -> int:
        return len(counted.of("GET /blocks/x"))

    with io.BufferedReader(BlockReader(fs, path), 512) as handle:
        for at, size in ((0, 512), (5_000_000, 10), (len(data) - 5, 100), (len(data), 7), (2 << 20, 3), (100 << 20, 5)):
            handle.seek(at)
            assert handle.read(size) == data[at : at + size]
        assert reads() == 4 + 1  # of the first block the next one too
        handle.seek(0)
        assert handle.read() == data
        assert handle.tell() == len(data)
    assert reads() <= 5 + 41
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("blocks")]
    with pytest.raises(FileNotFoundError):
        BlockReader(fs, "blocks/none")


def test_members_of_a_zip_are_read_together(s3, counted) -> None:
    data = {f"{index}.jpg": image(index) for index in range(30)}
    data["large.jpg"] = random.Random(0).randbytes(3 << 20)
    data["after.jpg"] = image(99)
    (s3.served / "zips").mkdir()
    with zipfile.ZipFile(s3.served / "zips" / "images.zip", "w") as packed:
        for name, content in data.items():
            packed.writestr(name, content, zipfile.ZIP_DEFLATED)
    archive = ZipArchive("s3://zips/images.zip")
    before = len(counted.requests)
    archive.expect([*data, "gone.jpg"])
    assert {name: archive.read(name, 1 << 30) for name in data} == data
    assert len(counted.requests) - before == 3  # the small ones, the large one, and the one after it
    assert not archive.spans
    assert archive.read("3.jpg", 1 << 30) == data["3.jpg"]  # once more, by itself


def test_rows_of_a_tsv_in_s3(s3, tmp_path: Path) -> None:
    (s3.served / "tsv").mkdir()
    write_tsv(s3.served / "tsv" / "mmb.tsv", [tsv_row(number) for number in range(60)])
    block = Ingest(format="mmbench_tsv", dataset="mmb", split="test")
    located = [str(getattr(item, "location", "")) for item in mmbench_tsv.read("s3://tsv/mmb.tsv", block, None)]
    media = mmbench_tsv.TsvImages("s3://tsv/mmb.tsv")
    assert media.concurrent
    finds: list[Find] = [lambda limit, row=source: ("x", row.read("x", limit)) for source in media.sources(located)]
    assert [read()[1] for read in read_ahead.read_ahead(finds, 1 << 20)] == [image(number) for number in range(60)]


def test_a_server_that_is_lost_ends_the_reads(s3, monkeypatch) -> None:
    (s3.served / "lost").mkdir()
    for index in range(50):
        (s3.served / "lost" / f"{index}.jpg").write_bytes(image(index))
    with storage.s3_patience(0.5):
        folder = MediaFolder("s3://lost")
        relay = s3_process.Relay(s3.port, lambda request, sent: b"/lost/20.jpg" in request)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
        PatientS3.clear_instance_cache()
        folder = MediaFolder("s3://lost")
        finds = [lambda limit, name=f"{index}.jpg": (name, folder.read(name, limit)) for index in range(50)]
        reads = read_ahead.read_ahead(finds, 1 << 20)
        contents = []
        with pytest.raises(StorageLost):
            contents += [read()[1] for read in reads]
        for read in read_ahead.read_ahead(finds[:20], 1 << 20):
            contents.append(read()[1])
    assert contents == [image(index) for index in range(20)]
    reads.close()
    assert not media_threads()
    relay.close()
    PatientS3.clear_instance_cache()
