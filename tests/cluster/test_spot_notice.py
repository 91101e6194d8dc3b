"""The spot notice on a VM: the answers of the metadata servers of AWS and Google, and which node is this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster import spot_notice
from voco.run import units


class _Metadata(BaseHTTPRequestHandler):
    """Answers like AWS's server (IMDSv2: a token first) and Google's (a header). `reclaimed`: whether there is a notice."""

    reclaimed = False

    def do_PUT(self) -> None:
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._answer(200 if self.path == "/latest/api/token" and seconds else 400, "the-token")

    def do_GET(self) -> None:
        if self.path == "/latest/meta-data/spot/instance-action":
            authorized = self.headers.get("X-aws-ec2-metadata-token") == "the-token"
            code = 401 if not authorized else 200 if self.reclaimed else 404
            self._answer(code, '{"action": "terminate", "time": "2030-01-01T00:02:00Z"}' if self.reclaimed else "")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            authorized = self.headers.get("Metadata-Flavor") == "Google"
            self._answer(200 if authorized else 403, "TRUE" if self.reclaimed else "FALSE")
        else:
            self._answer(400, "")

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing into the test's output."""


@pytest.fixture
def metadata() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_notice_is_seen_when_it_comes(cloud: str, metadata: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not spot_notice.has_notice(cloud, metadata)
    monkeypatch.setattr(_Metadata, "reclaimed", True)
    assert spot_notice.has_notice(cloud, metadata)


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_an_error_of_the_server_is_raised_and_no_notice(cloud: str, metadata: str) -> None:
    with pytest.raises(OSError, match="HTTP Error 400"):
        spot_notice.has_notice(cloud, metadata + "/elsewhere")


@pytest.mark.ray
def test_own_node_id(ray_local: str) -> None:
    import ray

    assert spot_notice.own_node_id(ray_local) == ray.get_runtime_context().get_node_id()


@pytest.mark.ray
def test_cpu_work_runs_where_no_node_has_a_label(ray_local: str) -> None:
    """On a laptop the selector of `cluster/` has no effect, neither on tasks nor on Ray Data's actors."""
    import ray
    import ray.data

    task = ray.remote(num_cpus=1, label_selector=units.CPU_WORK)(lambda value: abs(value))
    assert ray.get(task.remote(-3), timeout=60) == 3

    class Same:
        def __call__(self, batch: dict[str, object]) -> dict[str, object]:
            return batch

    pool = ray.data.ActorPoolStrategy(size=1)
    rows = ray.data.range(3).map_batches(Same, compute=pool, num_cpus=1, label_selector=units.CPU_WORK)
    assert rows.count() == 3
