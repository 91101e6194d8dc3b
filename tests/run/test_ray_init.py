"""How a run joins or starts Ray: one line when that fails, sockets under a long TMPDIR, and no proxy for this machine."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ingest import source

from voco.commands.cluster import ClusterTarget, connect
from voco.errors import Refused
from voco.run import ray_init
from voco.run.proxies import LOOPBACK, bypass_proxy, proxy_of

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
# shorter than Ray's own minutes
IMPATIENT = {
    "RAY_gcs_rpc_server_connect_timeout_s": "1",
    "RAY_py_gcs_connect_timeout_s": "3",
    "RAY_gcs_server_request_timeout_seconds": "3",
}


class Proxy(http.server.ThreadingHTTPServer):
    """An HTTP proxy that reaches nothing: it records each request and answers 502, or never answers."""

    def __init__(self, answers: bool = True) -> None:
        self.requests: list[str] = []
        self.end = threading.Event()
        requests, end = self.requests, self.end

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                self.close_connection = True
                requests.append(self.rfile.readline(2000).decode(errors="replace").strip())
                if answers:
                    self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                else:
                    end.wait(60)

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.end.set()
        self.shutdown()
        self.server_close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    server = Proxy()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, "")  # remembered, so that what a test writes ends with it
        monkeypatch.setenv(name.upper(), "")
        monkeypatch.delenv(name)
        monkeypatch.delenv(name.upper())


def run(job: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | variables
    command = [sys.executable, "-m", "pipelines", "run", str(job)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job of two units on one Ray worker."""
    source.write(tmp_path / "source", *source.good(20, 20))
    described = source.job(tmp_path / "source", tmp_path / "out", unit_rows=10, in_process_rows=0)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(described.model_dump(exclude_none=True)))
    return tmp_path / "job.yaml"


@pytest.mark.ray
def test_a_run_with_a_long_tmpdir_and_a_proxy_that_reaches_nothing(job: Path, proxy: Proxy, tmp_path: Path) -> None:
    """Ray's sockets would have paths of more than 107 bytes, and its processes ask each other by HTTP on 127.0.0.1."""
    long = tmp_path / "/".join(["directory"] * 8)
    long.mkdir(parents=True)
    done = run(job, TMPDIR=str(long), http_proxy=proxy.url, https_proxy=proxy.url)
    assert done.returncode == 0, done.stderr
    assert "read 20 = written 20" in done.stdout
    assert list(long.glob("ray/session_*/logs"))  # Ray's files are where TMPDIR says
    links = [link for link in Path("/tmp").glob("voco-*/ray") if link.is_symlink()]
    assert not [link for link in links if str(long) in os.readlink(link)]  # the short link ends with the run
    assert not [request for request in proxy.requests if any(host in request for host in LOOPBACK)]


@pytest.mark.ray
def test_a_ray_that_does_not_start_is_one_line(job: Path) -> None:
    """Its GCS cannot have a port that is in use: really started and failed, as often as a run tries."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        done = run(job, RAY_GCS_SERVER_PORT=str(taken.getsockname()[1]), **IMPATIENT)
    assert done.returncode == 1, done.stderr
    *warnings, line = done.stderr.splitlines()
    assert line.startswith("failed: Ray did not start on this machine: Failed to start GCS.")
    assert len(warnings) == ray_init.STARTS - 1
    assert all(warning.startswith("warning: Ray did not start on this machine (") for warning in warnings)


def test_a_closed_port_and_a_port_of_something_else_are_one_line(job: Path, proxy: Proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    for port in (closed, proxy.server_address[1]):
        done = run(job, RAY_ADDRESS=f"127.0.0.1:{port}")
        assert done.returncode == 1
        assert done.stderr.startswith(
            f"failed: RAY_ADDRESS=127.0.0.1:{port}: no Ray cluster answers there: nothing that speaks gRPC"
        )
        assert done.stderr.count("\n") == 1
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:
        done = run(job, TMPDIR=file.name)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Not a directory" in done.stderr


def test_the_length_of_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """107 bytes are allowed: `/` + 36 bytes + `/ray` + the suffix of 65 with the longest pid."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    room = ray_init.SOCKET_BYTES - len(ray_init.SOCKET_SUFFIX) - len("/ray")
    monkeypatch.setenv("TMPDIR", "/" + "x" * (room - 1))
    assert ray_init.short_temp_dir() is None
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * room)))
    link = ray_init.short_temp_dir()
    assert link is not None
    assert os.path.realpath(link) == str(tmp_path / ("x" * room) / "ray")
    assert len(link + ray_init.SOCKET_SUFFIX) <= ray_init.SOCKET_BYTES
    monkeypatch.setattr(ray_init, "SHORT_FOLDERS", (str(tmp_path / "none"),))
    with pytest.raises(
        Refused, match=r"TMPDIR: Ray's sockets in .*/ray would have paths of \d+ bytes, expected at most 107; set RAY_TM"
    ):
        ray_init.short_temp_dir()


def test_no_proxy_gets_this_machine_and_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    bypass_proxy(*LOOPBACK)
    assert "no_proxy" not in os.environ  # without a proxy nothing is set
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "example.org, 10.0.0.0/8")
    assert proxy_of("http://127.0.0.1:8265") == "http://proxy.example:3128"
    bypass_proxy(*LOOPBACK)
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,10.0.0.0/8,127.0.0.1,localhost,::1"
    assert proxy_of("http://127.0.0.1:8265") is proxy_of("http://localhost:1") is proxy_of("http://example.org") is None
    assert proxy_of("http://cluster.example:8265") == "http://proxy.example:3128"
    assert proxy_of("https://cluster.example:8265") is None
    monkeypatch.setenv("no_proxy", "*")
    bypass_proxy(*LOOPBACK)
    assert os.environ["no_proxy"] == "*"


@pytest.mark.parametrize("answers", [True, False])
def test_a_cluster_behind_a_proxy_that_does_not_reach_it_is_one_line(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voco.commands.cluster.PROXY_S", 1.0)
    server = Proxy(answers)
    monkeypatch.setenv("http_proxy", server.url.replace("http://", "http://user:secret@"))
    target = ClusterTarget("http://cluster.example:8265", None, ())
    with pytest.raises(Refused) as refused:
        connect(target)
    server.stop()
    message = str(refused.value)
    assert message.startswith(f"http://cluster.example:8265: no Ray cluster answers there through the proxy {server.url}: ")
    assert message.endswith("if it needs no proxy: export no_proxy=cluster.example")
    assert "secret" not in message
    assert ("502" if answers else "timed out") in message
    assert server.requests == ["GET http://cluster.example:8265/api/version HTTP/1.1"]
