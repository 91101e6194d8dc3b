"""HTTP proxies of the environment: never for this machine, and named where a cluster does not answer through one.

`http_proxy` and `https_proxy` count for every host that `no_proxy` leaves out, this machine too, and a proxy elsewhere cannot
reach it. The names are those of curl and of Python's `urllib.request.getproxies`; in lower case they win.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_loopback(host: str) -> bool:
    """True for localhost and the addresses of this machine's loopback."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def bypass_proxy(*hosts: str) -> None:
    """Add hosts to `no_proxy` of this process and of those that it starts; nothing without a proxy or with `no_proxy=*`."""
    current = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    listed = [host.strip() for host in current.split(",") if host.strip()]
    if "*" in listed or not {"http", "https", "all"} & getproxies().keys():
        return
    value = ",".join([*listed, *(host for host in hosts if host not in listed)])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = value


def proxy_of(url: str) -> str | None:
    """The proxy that requests to a URL go through, without its password; None when they go there directly."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or not parts.hostname or proxy_bypass(parts.hostname):
        return None
    address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return f"{address.scheme}://{address.hostname}" + (f":{address.port}" if address.port else "")
