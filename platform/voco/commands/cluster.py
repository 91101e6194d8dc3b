"""Which Ray cluster a command talks to, and the connection to its Jobs API."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from voco.errors import Refused, message_line
from voco.run.proxies import bypass_proxy, is_loopback, proxy_of

CLUSTER_FILE = Path(".demo/cluster.json")  # which voco.demo.cluster writes
RAY_SESSIONS = "/tmp/ray"  # Ray's default
PROXY_S = 10.0  # that a cluster may take to answer through an HTTP proxy


@dataclass(frozen=True)
class ClusterTarget:
    """A cluster's Jobs API. `token_path` is None where the environment has the token, or none is needed."""

    address: str
    token_path: str | None
    temp_dirs: tuple[str, ...]  # where that cluster's sessions may be, if it runs on this machine

    def headers(self) -> dict[str, str]:
        token = os.environ.get("RAY_AUTH_TOKEN", "")
        if self.token_path is not None:
            token = Path(self.token_path).read_text().strip()
        return {"Authorization": f"Bearer {token}"} if token else {}

    @property
    def host(self) -> str:
        return urlparse(self.address).hostname or ""

    def bypass_proxy(self) -> None:
        """Never ask a cluster on this machine through an HTTP proxy, which would look for it on the proxy's machine."""
        if is_loopback(self.host):
            bypass_proxy(self.host)

    def environment(self) -> list[str]:
        """What a `ray` command in another shell needs; never the token itself."""
        if self.token_path is not None:
            return ["RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={os.path.abspath(self.token_path)}"]
        return ["RAY_AUTH_MODE=token"] if os.environ.get("RAY_AUTH_TOKEN") else []


def environment_address() -> str | None:
    """The address of the cluster that the environment names."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or None


def find_cluster(address: str | None = None) -> ClusterTarget:
    """The cluster to talk to: `address`, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else the demo's own."""
    address = address or environment_address()
    demo = json.loads(CLUSTER_FILE.read_text()) if CLUSTER_FILE.exists() else None
    token_path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if demo is not None and (address is None or address.rstrip("/") == demo["dashboard"]):
        return ClusterTarget(demo["dashboard"], token_path or demo["token_path"], (demo["temp_dir"], RAY_SESSIONS))
    if address is None:
        raise Refused("no cluster: give --address http://HOST:8265 or set RAY_API_SERVER_ADDRESS, or start one with `make demo`")
    if "://" not in address:
        address = f"http://{address}"
    return ClusterTarget(address.rstrip("/"), token_path, (RAY_SESSIONS,))


def connect(target: ClusterTarget) -> Any:
    """A JobSubmissionClient. Raises Refused when the cluster does not answer, or does not accept the token."""
    os.environ["RAY_API_SERVER_ADDRESS"] = target.address  # it overrides the client's own argument
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    target.bypass_proxy()
    proxy = proxy_of(target.address)
    try:
        if proxy is not None:  # Ray's client has no time-out, and a proxy may keep a connection that leads nowhere
            _answer_through_proxy(target)
        return JobSubmissionClient(target.address, headers=target.headers())
    except AuthenticationError as error:
        source = target.token_path or "RAY_AUTH_TOKEN"
        raise Refused(f"{target.address}: the cluster does not accept the token of {source}; set RAY_AUTH_TOKEN_PATH") from error
    except FileNotFoundError as error:
        raise Refused(f"{target.token_path}: no such token file; set RAY_AUTH_TOKEN_PATH") from error
    except (OSError, RuntimeError) as error:  # a ConnectionError, or one of requests
        through, hint = "", ""
        if proxy is not None:
            through, hint = f" through the proxy {proxy}", f"; if it needs no proxy: export no_proxy={target.host}"
        raise Refused(f"{target.address}: no Ray cluster answers there{through}: {message_line(error)}{hint}") from error


def _answer_through_proxy(target: ClusterTarget) -> None:
    """Raises OSError when no dashboard answers in PROXY_S."""
    import requests

    answer = requests.get(f"{target.address}/api/version", headers=target.headers(), timeout=PROXY_S)
    if "ray_version" not in answer.text and answer.status_code not in (401, 403):
        raise ConnectionError(f"status {answer.status_code}, not a dashboard's answer")


def is_on_this_machine(client: Any, target: ClusterTarget) -> bool:
    """A loopback address may be a tunnel: the cluster is here only if its session directory is."""
    if not is_loopback(target.host):
        return False
    session = str(client._do_request("GET", "/api/version").json().get("session_name", ""))
    return bool(session) and any((Path(folder) / session).is_dir() for folder in target.temp_dirs)
