"""One URL's bytes from the public web: with limits on time, size and redirects, and never from a private address.

A host name is resolved once for each request and the connection goes to the checked address, so that a second resolution cannot
give another one. The environment's proxies are not used, because they resolve names themselves.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from voco.errors import message_line, one_line
from voco.ingest.source_row import BadRow

MAX_REDIRECTS = 5
REDIRECTS = {301, 302, 303, 307, 308}
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # statuses that are retried
BACKOFF_S = 0.5  # before the first retry, then twice as long each time
CHUNK_BYTES = 64 << 10
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits
NO_TRAINING = {"noai", "noimageai", "noindex", "noimageindex"}  # in X-Robots-Tag; img2dataset honours the same


@dataclass(frozen=True)
class DownloadLimits:
    """Limits on one download, from the keys of the job's `ingest` block."""

    timeout_s: float  # of one attempt, from name resolution to the last byte, redirects included
    retries: int
    allow_private_addresses: bool
    honour_noai: bool


class TransientFailure(Exception):
    """A failure after which another attempt may succeed."""


def download(url: str, max_bytes: int, limits: DownloadLimits) -> bytes:
    """The bytes at a URL, at most `max_bytes`.

    Raises BadRow: download_refused (a private address, a scheme other than http and https, a tag that forbids it),
    download_failed (after the retries), media_too_large.
    """
    for attempt in range(limits.retries + 1):
        try:
            return _attempt(url, max_bytes, limits)
        except TransientFailure as error:
            if attempt == limits.retries:
                attempts = f" after {attempt + 1} attempts" if attempt else ""
                raise BadRow("download_failed", f"{_shown(url)}: {error}{attempts}") from error
            time.sleep(BACKOFF_S * 2**attempt)
    raise AssertionError("unreachable")


def _attempt(url: str, max_bytes: int, limits: DownloadLimits) -> bytes:
    deadline = time.monotonic() + limits.timeout_s
    current = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            connection = _connection(current, limits, deadline)
            try:
                answer = _get(connection, current)
                if answer.status not in REDIRECTS:
                    return _body(answer, current, max_bytes, limits)
                current = urljoin(current, answer.headers.get("Location", ""))
            finally:
                connection.end()
    except ssl.SSLCertVerificationError as error:
        raise BadRow("download_failed", f"{_shown(current)}: {error.verify_message}") from error
    except TimeoutError as error:
        raise TransientFailure(f"no answer within {limits.timeout_s:g} s") from error
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise TransientFailure(f"the name does not resolve: {error.strerror}") from error
        raise BadRow("download_failed", f"{_shown(current)}: the name does not resolve: {error.strerror}") from error
    except (OSError, http.client.HTTPException) as error:
        raise TransientFailure(one_line(error)) from error
    except ValueError as error:  # a bad host name, a bad port, a line break in a Location
        raise BadRow("download_failed", f"{_shown(current)}: {message_line(error)}") from error
    raise BadRow("download_failed", f"{_shown(url)}: more than {MAX_REDIRECTS} redirects")


def _get(connection: http.client.HTTPConnection, url: str) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = f"?{quote(parts.query, safe='%:@!$&()*+,;=~-._/?[]')}" if parts.query else ""
    connection.request("GET", path + query, headers={"User-Agent": "voco-ingest", "Accept-Encoding": "identity", "Accept": "*/*"})
    return connection.getresponse()


def _body(answer: http.client.HTTPResponse, url: str, max_bytes: int, limits: DownloadLimits) -> bytes:
    if answer.status in TRANSIENT:
        raise TransientFailure(f"status {answer.status}")
    if answer.status != 200:
        raise BadRow("download_failed", f"{_shown(url)}: status {answer.status}")
    tags = ",".join(answer.headers.get_all("X-Robots-Tag", []))
    forbidden = NO_TRAINING & {tag.rsplit(":", 1)[-1].strip().lower() for tag in tags.split(",")}
    if limits.honour_noai and forbidden:
        raise BadRow("download_refused", f"{_shown(url)}: X-Robots-Tag: {', '.join(sorted(forbidden))}")
    if answer.length is not None and answer.length > max_bytes:
        raise _too_large(url, max_bytes)
    expected, body = answer.length, bytearray()
    while chunk := answer.read1(CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(url, max_bytes)
    if expected is not None and len(body) != expected:
        raise TransientFailure(f"{len(body)} bytes of {expected}")
    return bytes(body)


def _too_large(url: str, max_bytes: int) -> BadRow:
    return BadRow("media_too_large", f"{_shown(url)}: more than ingest.max_media_bytes {max_bytes}")


def _shown(url: str) -> str:
    return url.encode("utf-8", "backslashreplace").decode()[:200]


def _connection(url: str, limits: DownloadLimits, deadline: float) -> _Http:
    """An unopened connection, which will check the address. Raises BadRow(download_refused) for another scheme."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadRow("download_refused", f"{_shown(url)}: expected http or https, and a host")
    secure = parts.scheme == "https"
    return _Http(parts.hostname, parts.port or (443 if secure else 80), secure, limits, deadline)


def _dial(host: str, port: int, limits: DownloadLimits, deadline: float) -> socket.socket:
    """A socket to the first address of the host that answers. Raises BadRow when one of its addresses is private."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in addresses:
        if not limits.allow_private_addresses and not is_public(str(address[0])):
            allow = "ingest.allow_private_addresses: true allows it"
            raise BadRow("download_refused", f"{host[:100]}: the address {address[0]} is not public; {allow}")
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_remaining(deadline))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def is_public(address: str) -> bool:
    """True for a public address by IANA's registries. An IPv4 address inside an IPv6 address counts as itself."""
    parsed = ipaddress.ip_address(address.split("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None or parsed in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
        if parsed.sixtofour is not None or parsed.teredo is not None:  # tunnels to any IPv4 address
            return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved and not parsed.is_unspecified


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class _Http(http.client.HTTPConnection):
    """HTTP, or HTTPS when `secure`, over a socket to a checked address and with a deadline."""

    def __init__(self, host: str, port: int, secure: bool, limits: DownloadLimits, deadline: float) -> None:
        super().__init__(host, port)
        self.default_port = 443 if secure else 80  # the port that the Host header omits
        self.secure, self.limits, self.deadline = secure, limits, deadline
        self.raw: socket.socket | None = None

    def connect(self) -> None:
        self.raw = _dial(self.host, self.port, self.limits, self.deadline)
        if self.secure:
            self.raw.settimeout(_remaining(self.deadline))
            self.raw = TLS.wrap_socket(self.raw, server_hostname=self.host)
        self.sock: Any = _Timed(self.raw, self.deadline)

    def end(self) -> None:
        self.close()
        if self.raw is not None:
            self.raw.close()


TLS = ssl.create_default_context()


class _Timed(io.RawIOBase):
    """A socket with one deadline for all operations; a socket's own timeout restarts with every byte that arrives."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline

    def sendall(self, data: Any) -> None:
        self.sock.settimeout(_remaining(self.deadline))
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(_remaining(self.deadline))
        return self.sock.recv_into(buffer)

    def close(self) -> None:
        """Does nothing: http.client closes its socket before the answer is read. `_Http.end` closes it."""
