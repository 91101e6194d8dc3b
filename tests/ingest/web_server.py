"""A real HTTP server on loopback whose paths behave like the web."""

from __future__ import annotations

import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ingest.source import image

MEETING = threading.Barrier(4, timeout=20)
ROBOTS = {"noai": "noai", "bot": "otherbot: NoImageAI, all", "all": "all"}


class Web(BaseHTTPRequestHandler):
    """/image/7.jpg, /flaky/7.jpg (fails twice), /status/404, /slow (drips), /huge, /redirect/3, /loop, /to/<url>, ..."""

    protocol_version = "HTTP/1.1"
    requests: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        Web.requests[self.path] += 1
        kind, _, argument = self.path[1:].partition("/")
        try:
            getattr(self, f"_{kind}")(argument)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, data: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _image(self, argument: str) -> None:
        number = int(argument.split(".")[0])
        time.sleep(0.02 * (number % 3))  # so that they end in another order than they started
        self._send(image(number))

    def _meet(self, argument: str) -> None:
        """Answers when four requests are open at the same time."""
        MEETING.wait()
        self._image(argument)

    def _flaky(self, argument: str) -> None:
        if Web.requests[self.path] == 1:
            self._send(b"", 503)
        elif Web.requests[self.path] == 2:
            self._send(image(int(argument.split(".")[0]))[:50], length=5000)
            self.close_connection = True
        else:
            self._image(argument)

    def _status(self, argument: str) -> None:
        self._send(b"sorry", int(argument))

    def _old(self, argument: str) -> None:
        """HTTP/1.0: no length, the body ends with the connection."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + image(int(argument.split(".")[0])))
        self.close_connection = True

    def _chunked(self, argument: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        data = image(int(argument.split(".")[0]))
        for start in range(0, len(data), 100):
            piece = data[start : start + 100]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def _drip(self, argument: str) -> None:
        """Sends the head or the body byte by byte, so that no single read takes long."""
        head = b"HTTP/1.1 200 OK\r\nX-Fill: " + b"x" * 1000
        if argument == "body":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for byte in head:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def _silent(self, argument: str) -> None:
        time.sleep(3)
        self.close_connection = True

    def _huge(self, argument: str) -> None:
        if argument == "said":
            self._send(b"x", length=1 << 40)
            self.close_connection = True
            return
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        self.close_connection = True
        while True:
            self.wfile.write(bytes(1 << 16))

    def _redirect(self, argument: str) -> None:
        hops = int(argument)
        self._send(b"", 302, Location=f"/redirect/{hops - 1}" if hops else "/image/5.jpg")

    def _loop(self, argument: str) -> None:
        self._send(b"", 301, Location="/loop")

    def _to(self, argument: str) -> None:
        self._send(b"", 302, Location=argument)

    def _robots(self, argument: str) -> None:
        self._send(image(6), X_Robots_Tag=ROBOTS[argument])

    def _garbage(self, argument: str) -> None:
        self.wfile.write(b"this is no HTTP\r\n\r\n")
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def certificate(folder: Path) -> Path:
    """A self-signed certificate for `localhost` and its key in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now - timedelta(1), now + timedelta(1)
    )
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(plain[0]) + key.private_bytes(*plain))
    return folder / "pem"


@contextmanager
def serving(pem: Path | None = None) -> Iterator[str]:
    """Yields the server's root, http://127.0.0.1:<port>, or https://localhost:<port> with a certificate."""
    Web.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    if pem is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"{'http://127.0.0.1' if pem is None else 'https://localhost'}:{server.server_port}"
    server.shutdown()
    server.server_close()
