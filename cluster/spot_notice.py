"""Tell Ray that this VM is about to be reclaimed. `ray start` on a VM watches no spot notice; KubeRay's pods do not need this.

    python spot_notice.py aws|gcp HEAD:6379

It polls the cloud's metadata server every 5 s. On a notice it drains the node with the seconds that are left: Ray starts
nothing new on it, and Ray Train saves a checkpoint and continues elsewhere. It needs only the standard library and Ray.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
DRAIN_SECONDS = {"aws": 110, "gcp": 25}  # the notice comes 2 minutes or 30 s before the end; minus the time until we see it
POLL_S = 5.0


def has_notice(cloud: str, metadata: str) -> bool:
    """True when the cloud announces the end of this machine. `metadata` is the server's base URL.

    AWS answers 404 until there is a notice, Google TRUE or FALSE. Raises OSError when the server does not answer.
    """
    if cloud == "gcp":
        path, headers = "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
        return _fetch(metadata + path, headers).strip() == "TRUE"
    token = _fetch(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        return bool(_fetch(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise


def _fetch(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=3) as response:
        return str(response.read().decode())


def own_node_id(head: str) -> str:
    """Hex id of the live node with this machine's address. Raises RuntimeError when the cluster has none."""
    from ray._private.services import get_node_ip_address
    from ray._raylet import GcsClient

    own_address = get_node_ip_address(head)
    for node_id, node in GcsClient(address=head).get_all_node_info().items():
        if node.node_manager_address == own_address and node.state == 0:  # GcsNodeInfo.ALIVE
            return str(node_id.hex())
    raise RuntimeError(f"{head} has no live node at {own_address}")


def drain(head: str, node_id: str, seconds: int) -> None:
    """Drain the node within `seconds`. Raises CalledProcessError when the cluster rejects it."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "drain-node", "--address", head, "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    subprocess.run([*command, "--reason-message", "spot notice", "--deadline-remaining-seconds", str(seconds)], check=True)


def main(cloud: str, head: str) -> int:
    """Wait for a notice, then drain this node and end."""
    while True:
        try:
            if has_notice(cloud, METADATA[cloud]):
                break
        except OSError as error:  # the next poll may succeed
            print(f"metadata: {error}", flush=True)
        time.sleep(POLL_S)
    drain(head, own_node_id(head), DRAIN_SECONDS[cloud])
    print("spot notice: this node is drained", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
