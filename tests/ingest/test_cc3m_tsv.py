"""CC3M's TSV, and downloads from a real server that behaves as the web does."""

import dataclasses
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest.source import image, part_hashes, table
from ingest.web_server import Web as Server
from ingest.web_server import certificate, serving

import pipelines
from voco.errors import Refused
from voco.ingest.captions import image_request
from voco.ingest.formats.cc3m_tsv import LINE_BYTES, read
from voco.ingest.media import download, web
from voco.ingest.media.download import DownloadLimits, is_public
from voco.ingest.media.web import WebMedia
from voco.ingest.source_row import BadRow, Reject, SourceRow
from voco.job.config import Ingest
from voco.job.load import build_job
from voco.job.spec import Job

BLOCK = Ingest(format="cc3m_tsv", dataset="cc3m")
OPEN = DownloadLimits(timeout_s=5, retries=2, allow_private_addresses=True, honour_noai=True)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF_S", 0.01)


@pytest.fixture
def server() -> Iterator[str]:
    with serving() as root:
        yield root


def job(source: Path, output: Path, **block: object) -> Job:
    raw = {
        "name": "tsv-test",
        "kind": "ingest",
        "inputs": {"annotations": str(source)},
        "output": str(output),
        "resources": {"workers": 1},
        "ingest": {"format": "cc3m_tsv", "dataset": "cc3m", "max_reject_share": 1.0, **block},
    }
    return build_job("test.yaml", raw)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def lost(url: str, web: DownloadLimits = OPEN, limit: int = 1 << 20) -> BadRow:
    with pytest.raises(BadRow) as caught:
        download.download(url, limit, web)
    return caught.value


def test_golden_row(tmp_path) -> None:
    source = write(tmp_path / "train.tsv", "x\thttp://a/b", "a red kite .\thttp://example.org/kite.jpg?x=1")
    (_, item) = read(str(source), BLOCK, None)
    assert isinstance(item, SourceRow)
    request, placeholder = image_request("GCC_train_000000001")
    assert (item.source, item.paths, item.location) == (
        "train.tsv:1",
        ("GCC_train_000000001.jpg",),
        "http://example.org/kite.jpg?x=1",
    )
    assert item.turns == (("user", request), ("assistant", "a red kite ."))
    assert item.conversation["placeholder"] == placeholder
    assert item.conversation["extra"] == '{"url":"http://example.org/kite.jpg?x=1"}'


BAD = {
    "one field": (b"caption only", "bad_record"),
    "three fields": (b"a\tb\thttp://h/x", "bad_record"),
    "an empty line": (b"", "bad_record"),
    "a header": (b"caption\turl", "bad_record"),
    "no host": (b"a\thttp:///x", "bad_record"),
    "no port": (b"a\thttp://h:99999/x", "bad_record"),
    "an open bracket": (b"a\thttp://[::1/x", "bad_record"),
    "no caption": (b" \thttp://h/x", "empty_text"),
    "not UTF-8": (b"\xff\thttp://h/x", "bad_record"),
    "a URL that is not UTF-8": (b"a\thttp://h/\xff", "bad_record"),
    "a long line": (b"a" * (3 * LINE_BYTES) + b"\thttp://h/x", "bad_record"),
    "a long URL": (b"a\thttp://h/" + b"x" * 9000, "bad_record"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_costs_itself_only(tmp_path, name: str) -> None:
    raw, reason = BAD[name]
    (tmp_path / "x.tsv").write_bytes(b"\xef\xbb\xbfone\thttp://h/1\r\n" + raw + b"\nthree\thttp://h/3")
    first, bad, last = read(str(tmp_path / "x.tsv"), BLOCK, None)
    assert isinstance(first, SourceRow)
    assert first.turns[1] == ("assistant", "one")
    assert isinstance(bad, Reject)
    assert (bad.source, bad.reason) == ("x.tsv:1", reason)
    assert bad.detail.encode()
    assert isinstance(last, SourceRow)
    assert last.paths == ("GCC_train_000000002.jpg",)


def test_a_job_in_list_order_and_byte_equal(server, tmp_path) -> None:
    lines = [f"picture {index}\t{server}/image/{index}.jpg" for index in range(30)]
    lines += [f"a\t{server}/status/404", f"b\t{server}/flaky/3.jpg", f"c\t{server}/loop", f"d\t{server}/huge/said"]
    source = write(tmp_path / "train.tsv", *lines)
    done = pipelines.run(job(source, tmp_path / "one", allow_private_addresses=True, unit_rows=10))
    assert done.counts["rejected"] == {"download_failed": 2, "media_too_large": 1}
    assert done.counts["written"] == 31
    contents = {row["media"][0]["path"]: row["media"][0]["bytes"] for row in table(tmp_path / "one", "samples")}
    for index in range(30):
        assert contents[f"GCC_train_{index:09d}.jpg"] == image(index)
    assert contents["GCC_train_000000031.jpg"] == image(3)
    pipelines.run(job(source, tmp_path / "two", allow_private_addresses=True, unit_rows=10, download_threads=2))
    assert part_hashes(tmp_path / "one") == part_hashes(tmp_path / "two")


@pytest.mark.parametrize("names", [("url", "caption", "key"), ("URL", "TEXT", None)])
def test_a_parquet_list_of_urls(tmp_path, names: tuple[str, str, str | None]) -> None:
    """img2dataset's own output has keys, LAION's list has not; a folder is read in the order of its files' names."""
    url, caption, key = names
    for file, captions in (("b.parquet", ["later"]), ("a.parquet", ["a red kite", "a blue boat"])):
        columns = {url: [f"http://example.org/{text}.jpg".replace(" ", "") for text in captions], caption: captions}
        if key:
            columns[key] = [f"{file}-{number}" for number in range(len(captions))]
        pq.write_table(pa.table(columns), tmp_path / file)
    rows = [row for row in read(str(tmp_path), BLOCK, None) if isinstance(row, SourceRow)]
    assert [row.turns[1][1] for row in rows] == ["a red kite", "a blue boat", "later"]
    assert rows[2].location == "http://example.org/later.jpg"
    expected = ["a.parquet-0", "a.parquet-1", "b.parquet-0"] if key else ["000000000", "000000001", "000000002"]
    assert [row.conversation["source_id"] for row in rows] == expected
    pq.write_table(pa.table({"link": ["http://a/b"]}), tmp_path / "a.parquet")
    with pytest.raises(Refused, match="expected columns url and caption, or URL and TEXT, got link"):
        list(read(str(tmp_path), BLOCK, None))


def test_loopback_is_refused_by_default(server, tmp_path) -> None:
    port = server.rsplit(":", 1)[1]
    hosts = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "10.1.2.3"]
    hosts += ["169.254.169.254", "[fe80::1]", "[fd00::1]", "192.168.1.1"]
    source = write(tmp_path / "x.tsv", *(f"a\thttp://{host}:{port}/image/1.jpg" for host in hosts))
    done = pipelines.run(job(source, tmp_path / "out", allow_empty=True))
    assert done.counts["rejected"] == {"download_refused": len(hosts)}
    assert not Server.requests
    assert all("allow_private_addresses" in row["detail"] for row in table(tmp_path / "out", "rejects"))


def test_a_redirect_is_checked_as_the_first_address_is(server, monkeypatch) -> None:
    """The server's address counts as public; the addresses that it redirects to do not."""
    port = int(server.rsplit(":", 1)[1])
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    web = dataclasses.replace(OPEN, allow_private_addresses=False)
    assert download.download(f"{server}/to/{server}/image/1.jpg", 1 << 20, web) == image(1)
    for target in (f"http://127.0.0.2:{port}/image/1.jpg", "http://10.0.0.1/x", f"//127.0.0.3:{port}/image/1.jpg"):
        assert lost(f"{server}/to/{target}", web).reason == "download_refused"
    assert Server.requests["/image/1.jpg"] == 1
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
        assert lost(f"{server}/to/{target}", web).reason == "download_refused"


def test_public_addresses() -> None:
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address), address
    private = ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"]
    private += ["255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:10.0.0.1"]
    private += ["64:ff9b::a00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2"]
    for address in private:
        assert not is_public(address), address


def test_statuses_and_retries(server) -> None:
    assert lost(f"{server}/status/404").reason == "download_failed"
    assert Server.requests["/status/404"] == 1
    bad = lost(f"{server}/status/503")
    assert (bad.reason, Server.requests["/status/503"]) == ("download_failed", 3)
    assert "503 after 3 attempts" in bad.detail
    assert download.download(f"{server}/flaky/4.jpg", 1 << 20, OPEN) == image(4)
    assert Server.requests["/flaky/4.jpg"] == 3
    once = dataclasses.replace(OPEN, retries=1)
    assert lost(f"{server}/flaky/5.jpg", once).reason == "download_failed"
    assert lost(f"{server}/garbage/x").reason == "download_failed"


@pytest.mark.parametrize("path", ["old/7.jpg", "chunked/7.jpg", "redirect/4"])
def test_every_transfer_encoding_is_read(server, path: str) -> None:
    assert download.download(f"{server}/{path}", 1 << 20, OPEN) == image(5 if "redirect" in path else 7)


def test_redirects_end(server) -> None:
    for path in ("loop", "redirect/9"):
        bad = lost(f"{server}/{path}")
        assert (bad.reason, "more than 5 redirects" in bad.detail) == ("download_failed", True)
    assert Server.requests["/loop"] == 6


@pytest.mark.parametrize("path", ["drip/head", "drip/body", "silent/x"])
def test_the_time_is_of_the_whole_attempt(server, path: str) -> None:
    started = time.monotonic()
    bad = lost(f"{server}/{path}", dataclasses.replace(OPEN, timeout_s=0.5, retries=0))
    assert bad.reason == "download_failed"
    assert "no answer within 0.5 s" in bad.detail
    assert time.monotonic() - started < 2.5  # the server would send for far longer


@pytest.mark.parametrize("path", ["huge/said", "huge/sent"])
def test_the_size_is_limited(server, path: str) -> None:
    assert lost(f"{server}/{path}", limit=1 << 20).reason == "media_too_large"
    exact = len(image(1))
    assert download.download(f"{server}/image/1.jpg", exact, OPEN) == image(1)
    assert lost(f"{server}/image/1.jpg", limit=exact - 1).reason == "media_too_large"


def test_robots(server) -> None:
    for path in ("noai", "bot"):
        assert lost(f"{server}/robots/{path}").reason == "download_refused"
        free = dataclasses.replace(OPEN, honour_noai=False)
        assert download.download(f"{server}/robots/{path}", 1 << 20, free) == image(6)
    assert download.download(f"{server}/robots/all", 1 << 20, OPEN) == image(6)


def test_servers_that_do_not_answer_are_failed_downloads(server) -> None:
    assert lost("http://127.0.0.1:9/x").reason == "download_failed"
    assert lost(f"https{server[4:]}/image/1.jpg").reason == "download_failed"  # the server has no TLS
    assert lost(f"http://{'x' * 70}.invalid/x").reason == "download_failed"


def test_inputs_media_is_refused(tmp_path) -> None:
    ingest_job = job(write(tmp_path / "x.tsv", "a\thttp://h/x"), tmp_path / "out")
    inputs = ingest_job.inputs.model_copy(update={"media": str(tmp_path)})
    with pytest.raises(Refused, match=r"inputs.media: expected nothing: cc3m_tsv rows say where their media are"):
        pipelines.run(ingest_job.model_copy(update={"inputs": inputs}))


def test_tls_is_verified(tmp_path, monkeypatch) -> None:
    pem = certificate(tmp_path)
    with serving(pem) as root:
        bad = lost(f"{root}/image/1.jpg")
        assert (bad.reason, "certificate" in bad.detail) == ("download_failed", True)
        monkeypatch.setattr(download, "TLS", ssl.create_default_context(cafile=str(pem)))
        assert download.download(f"{root}/image/1.jpg", 1 << 20, OPEN) == image(1)
        assert lost(f"{root.replace('localhost', '127.0.0.1')}/image/1.jpg").reason == "download_failed"  # another name


def test_a_name_is_resolved_once(server, monkeypatch) -> None:
    """A name that resolves to a public address first and a private address later gains nothing."""
    lookups = []

    def turning(host: str, port: int, **options: object) -> list[Any]:
        lookups.append(host)
        address = "127.0.0.1" if len(lookups) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(server.rsplit(":", 1)[1])))]

    monkeypatch.setattr(download.socket, "getaddrinfo", turning)
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    web = dataclasses.replace(OPEN, allow_private_addresses=False)
    assert download.download("http://turning.example/image/1.jpg", 1 << 20, web) == image(1)
    assert lookups == ["turning.example"]
    assert lost("http://turning.example/image/1.jpg", web).reason == "download_refused"


def test_several_at_a_time(server) -> None:
    """The server answers only when four requests are open at once."""
    source = WebMedia(dataclasses.replace(OPEN, retries=0, timeout_s=30), 4, 1 << 20)
    urls = [f"{server}/meet/{index}.jpg" for index in range(8)]
    contents = [medium.read("x", 1 << 20) for medium in source.sources(urls)]
    assert contents == [image(index) for index in range(8)]


def test_finished_downloads_are_limited_in_bytes(server, monkeypatch) -> None:
    """The first download is slow: later ones are fetched up to the limit in bytes, then wait."""
    monkeypatch.setattr(web, "WAITING_BYTES", 1)
    urls = [f"{server}/image/{index}.jpg" for index in range(30)]
    sources = WebMedia(OPEN, 3, 1 << 20).sources(urls)
    first = next(sources)
    time.sleep(0.5)
    assert sum(Server.requests.values()) <= 3  # each thread may have started one before the first had finished
    assert [first.read("x", 1)] + [medium.read("x", 1) for medium in sources] == [image(index) for index in range(30)]


def test_leaving_early_ends_the_threads(server, monkeypatch) -> None:
    monkeypatch.setattr(web, "WAITING_BYTES", 1)
    sources = WebMedia(OPEN, 3, 1 << 20).sources([f"{server}/image/{index}.jpg" for index in range(30)])
    next(sources).read("x", 1)
    sources.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("download")]
    assert sum(Server.requests.values()) < 30


@pytest.mark.ray
def test_ray_writes_the_same_bytes(ray_local, server, tmp_path) -> None:
    lines = [f"picture {index}\t{server}/{'image' if index % 5 else 'status'}/{404 + index}.jpg" for index in range(20)]
    source = write(tmp_path / "train.tsv", *lines, f"a\t{server}/status/404")
    pipelines.run(job(source, tmp_path / "here", allow_private_addresses=True, unit_rows=4))
    done = pipelines.run(job(source, tmp_path / "ray", allow_private_addresses=True, unit_rows=4, in_process_rows=0))
    assert done.counts["rejected"] == {"download_failed": 5}
    assert part_hashes(tmp_path / "ray") == part_hashes(tmp_path / "here")
