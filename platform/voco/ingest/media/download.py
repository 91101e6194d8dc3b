"""One URL's bytes from the public web: within a time, a size and a number of redirects, and never from a private address.

A name is resolved once for each request and the connection goes to the address that was checked, so that a name cannot
answer differently the second time. Proxies of the environment are not used: they would resolve names themselves.
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

from voco.errors import one_line
from voco.ingest.source_row import BadRow

MAX_REDIRECTS = 5
REDIRECTS = {301, 302, 303, 307, 308}
AGAIN = {408, 425, 429, 500, 502, 503, 504}  # statuses that may pass
BACKOFF_S = 0.5  # before the first retry, then twice as long each time
CHUNK = 64 << 10
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits
NO_TRAINING = {"noai", "noimageai", "noindex", "noimageindex"}  # X-Robots-Tag, as img2dataset honours them


@dataclass(frozen=True)
class DownloadLimits:
    """What a download may do; the keys of the job's `ingest` block."""

    timeout_s: float  # of one attempt, from the name's resolution to the last byte, redirects included
    retries: int
    allow_private_addresses: bool
    honour_noai: bool


class TransientFailure(Exception):
    """A failure that may be gone at the next attempt."""


def download(url: str, limit: int, web: DownloadLimits) -> bytes:
    """The bytes behind a URL, at most `limit`.

    Raises BadRow: download_refused (a private address, a scheme other than http and https, a tag that forbids it),
    download_failed (after the retries), media_too_large.
    """
    for attempt in range(web.retries + 1):
        try:
            return _attempt(url, limit, web)
        except TransientFailure as error:
            if attempt == web.retries:
                again = f" after {attempt + 1} attempts" if attempt else ""
                raise BadRow("download_failed", f"{_shown(url)}: {error}{again}") from error
            time.sleep(BACKOFF_S * 2**attempt)
    raise AssertionError("unreachable")


def _attempt(url: str, limit: int, web: DownloadLimits) -> bytes:
    deadline = time.monotonic() + web.timeout_s
    here = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            connection = _connection(here, web, deadline)
            try:
                answer = _ask(connection, here)
                if answer.status not in REDIRECTS:
                    return _body(answer, here, limit, web)
                here = urljoin(here, answer.headers.get("Location", ""))
            finally:
                connection.end()
    except ssl.SSLCertVerificationError as error:
        raise BadRow("download_failed", f"{_shown(here)}: {error.verify_message}") from error
    except TimeoutError as error:
        raise TransientFailure(f"no answer within {web.timeout_s:g} s") from error
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise TransientFailure(f"the name does not resolve: {error.strerror}") from error
        raise BadRow("download_failed", f"{_shown(here)}: the name does not resolve: {error.strerror}") from error
    except (OSError, http.client.HTTPException) as error:
        raise TransientFailure(one_line(error)) from error
    except ValueError as error:  # a host that is no name, a port that is no number, a line break in a Location
        raise BadRow("download_failed", f"{_shown(here)}: {' '.join(str(error).split())[:200]}") from error
    raise BadRow("download_failed", f"{_shown(url)}: more than {MAX_REDIRECTS} redirects")


def _ask(connection: http.client.HTTPConnection, url: str) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = f"?{quote(parts.query, safe='%:@!$&()*+,;=~-._/?[]')}" if parts.query else ""
    connection.request("GET", path + query, headers={"User-Agent": "voco-ingest", "Accept-Encoding": "identity", "Accept": "*/*"})
    return connection.getresponse()


def _body(answer: http.client.HTTPResponse, url: str, limit: int, web: DownloadLimits) -> bytes:
    if answer.status in AGAIN:
        raise TransientFailure(f"status {answer.status}")
    if answer.status != 200:
        raise BadRow("download_failed", f"{_shown(url)}: status {answer.status}")
    tags = ",".join(answer.headers.get_all("X-Robots-Tag", []))
    forbidden = NO_TRAINING & {tag.rsplit(":", 1)[-1].strip().lower() for tag in tags.split(",")}
    if web.honour_noai and forbidden:
        raise BadRow("download_refused", f"{_shown(url)}: X-Robots-Tag: {', '.join(sorted(forbidden))}")
    if answer.length is not None and answer.length > limit:
        raise _too_large(url, limit)
    expected, held = answer.length, bytearray()
    while chunk := answer.read1(CHUNK):
        held += chunk
        if len(held) > limit:
            raise _too_large(url, limit)
    if expected is not None and len(held) != expected:
        raise TransientFailure(f"{len(held)} bytes of {expected}")
    return bytes(held)


def _too_large(url: str, limit: int) -> BadRow:
    return BadRow("media_too_large", f"{_shown(url)}: more than ingest.max_media_bytes {limit}")


def _shown(url: str) -> str:
    return url.encode("utf-8", "backslashreplace").decode()[:200]


def _connection(url: str, web: DownloadLimits, deadline: float) -> _Http:
    """A connection to a checked address, not yet opened. Raises BadRow(download_refused)."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadRow("download_refused", f"{_shown(url)}: expected http or https, and a host")
    secure = parts.scheme == "https"
    return _Http(parts.hostname, parts.port or (443 if secure else 80), secure, web, deadline)


def _dial(host: str, port: int, web: DownloadLimits, deadline: float) -> socket.socket:
    """A socket to the first address of the host that answers. Raises BadRow when one of its addresses is private."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if not web.allow_private_addresses and not is_public(str(address[0])):
            allow = "ingest.allow_private_addresses: true allows it"
            raise BadRow("download_refused", f"{host[:100]}: the address {address[0]} is not public; {allow}")
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(deadline))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def is_public(address: str) -> bool:
    """True for an address of the public Internet, by IANA's registries; an IPv4 address inside an IPv6 one counts as itself."""
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None or found in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.sixtofour is not None or found.teredo is not None:  # tunnels to any IPv4 address
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved and not found.is_unspecified


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Http(http.client.HTTPConnection):
    """HTTP, or HTTPS when `secure`, over a socket to a checked address and with a deadline."""

    def __init__(self, host: str, port: int, secure: bool, web: DownloadLimits, deadline: float) -> None:
        super().__init__(host, port)
        self.default_port = 443 if secure else 80  # what the Host header leaves out
        self.secure, self.web, self.deadline = secure, web, deadline
        self.raw: socket.socket | None = None

    def connect(self) -> None:
        self.raw = _dial(self.host, self.port, self.web, self.deadline)
        if self.secure:
            self.raw.settimeout(_left(self.deadline))
            self.raw = TLS.wrap_socket(self.raw, server_hostname=self.host)
        self.sock: Any = _Timed(self.raw, self.deadline)

    def end(self) -> None:
        self.close()
        if self.raw is not None:
            self.raw.close()


TLS = ssl.create_default_context()


class _Timed(io.RawIOBase):
    """A socket with one deadline for everything; its own timeout starts again with every byte that drips in."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline

    def sendall(self, data: Any) -> None:
        self.sock.settimeout(_left(self.deadline))
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(_left(self.deadline))
        return self.sock.recv_into(buffer)

    def close(self) -> None:
        """Nothing: http.client closes its socket while the answer is still to be read. `_Http.end` does it."""
