"""A real S3 server on loopback behind a proxy that adds latency, limits the rate of each stream, and counts requests and bytes.

`rclone serve s3` answers; the proxy waits `latency_s` before each answer. The product's S3 client is pointed at the proxy by
`environment()`. Signatures stay valid because the client signs the proxy's host, which is forwarded unchanged.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web

CHUNK_BYTES = 1 << 16
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "proxy-authorization"}


class ObjectStore:
    """The bucket `bucket` over a folder, at `address`. `counts` has requests by method, and `sent` the bytes answered to GETs."""

    def __init__(self, folder: Path, latency_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self.folder, self.latency_s, self.bytes_per_s = folder, latency_s, bytes_per_s
        (folder / "bucket").mkdir(parents=True, exist_ok=True)
        self.counts: Counter[str] = Counter()
        self.sent = 0
        self.log: list[tuple[str, str, str, int]] = []  # method, path, range, bytes answered
        self._server_port, self.port = _free_port(), _free_port()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Variables that its client needs."""
        return {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": self.address,
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip

    def reset(self) -> None:
        self.counts.clear()
        self.log.clear()
        self.sent = 0

    @property
    def requests(self) -> int:
        return sum(self.counts.values())

    def start(self) -> None:
        rclone = Path(sys.executable).parent / "rclone"
        command = [str(rclone), "serve", "s3", str(self.folder), "--addr", f"127.0.0.1:{self._server_port}"]
        self._log_file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        options = ["--auth-key", "key,secret", "--dir-cache-time", "5ms", "--vfs-cache-mode", "off"]
        options += ["--etag-hash", ""]  # by default it reads the complete file for an MD5, at every request for a few bytes
        self.process = subprocess.Popen([*command, *options], stdout=self._log_file, stderr=self._log_file)
        deadline = time.monotonic() + 20
        while _refused(self._server_port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("rclone serve s3 did not start")
            time.sleep(0.05)
        threading.Thread(target=self._serve, daemon=True).start()
        self._ready.wait(20)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.process.terminate()
        self.process.wait(10)
        self._log_file.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._ready.set()
        self._loop.run_forever()

    async def _listen(self) -> None:
        connector = TCPConnector(limit=0, force_close=False)
        self._session = ClientSession(
            connector=connector, auto_decompress=False, timeout=ClientTimeout(total=None), cookie_jar=DummyCookieJar()
        )
        application = web.Application(client_max_size=1 << 34)
        application.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=1024).start()

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP | {"expect"}}
        body: Any = await request.read() if request.can_read_body else None
        url = f"http://127.0.0.1:{self._server_port}{request.raw_path}"
        async with self._session.request(
            request.method, _raw(url), headers=headers, data=body, allow_redirects=False, skip_auto_headers=("Content-Type",)
        ) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
            response = web.StreamResponse(status=answer.status, headers=kept)
            sent = 0
            await response.prepare(request)
            started = time.monotonic()
            async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                await response.write(chunk)
                sent += len(chunk)
                if self.bytes_per_s:
                    await asyncio.sleep(max(0.0, started + sent / self.bytes_per_s - time.monotonic()))
            await response.write_eof()
        self.counts[request.method] += 1
        self.sent += sent
        self.log.append((request.method, request.path, request.headers.get("Range", ""), sent))
        return response


@contextmanager
def serving(folder: Path, latency_s: float = 0.0, bytes_per_s: float | None = None) -> Iterator[ObjectStore]:
    """An object store that runs for the length of the block."""
    store = ObjectStore(folder, latency_s, bytes_per_s)
    store.start()
    try:
        yield store
    finally:
        store.stop()


def _raw(url: str) -> Any:
    from yarl import URL

    return URL(url, encoded=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
