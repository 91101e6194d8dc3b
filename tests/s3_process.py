"""A real S3 server that a test may stop and start again, and a relay in front of it that cuts connections."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`rclone serve s3` over a folder, on loopback, key `key` and secret `secret`. A folder in it is a bucket."""

    def __init__(self, served: Path, log: Path) -> None:
        self.served = served
        self.log = log
        self.port = free_port()
        self.start()

    def start(self) -> None:
        """Return once it answers."""
        rclone = Path(sys.executable).parent / "rclone"
        command = [str(rclone), "serve", "s3", str(self.served), "--addr", f"127.0.0.1:{self.port}", "--auth-key", "key,secret"]
        with self.log.open("a") as out:
            self.process = subprocess.Popen([*command, "--dir-cache-time", "5ms"], stdout=out, stderr=out)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "rclone ended at once"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError("rclone does not answer")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def environment(self) -> dict[str, str]:
        """Variables that its client needs."""
        return {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


class Relay:
    """Forwards connections to a port; `cut(request, sent)` may end one: the request's head, and the bytes answered so far."""

    def __init__(self, port: int, cut: Callable[[bytes, int], bool]) -> None:
        self.server_port = port
        self.cut = cut
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        state: dict[str, Any] = {"head": b"", "sent": 0}
        server = socket.create_connection(("127.0.0.1", self.server_port))

        def forward() -> None:
            with suppress(OSError):
                while data := client.recv(1 << 16):
                    if data.split(b" ", 1)[0] in (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE"):
                        state.update(head=data[:2000], sent=0)
                    server.sendall(data)
            _end(server)

        threading.Thread(target=forward, daemon=True).start()
        with suppress(OSError):
            while data := server.recv(1 << 16):
                if self.cut(state["head"], state["sent"]):
                    break
                client.sendall(data)
                state["sent"] += len(data)
        _end(client)
        _end(server)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
