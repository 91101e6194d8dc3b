"""Tell Ray that this VM is about to be taken away: `ray start` on a VM watches no spot notice, KubeRay's pods need none of this.

    python spot_notice.py aws|gcp HEAD:6379

It asks the cloud's metadata server every 5 s. On a notice the node is drained, with the seconds that are left: Ray starts
nothing new on it, and Ray Train saves a checkpoint and goes on elsewhere. Only the standard library and Ray are needed.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
SECONDS = {"aws": 110, "gcp": 25}  # between the notice and the end, less what it takes to notice: 2 minutes, 30 s
POLL_S = 5.0


def noticed(cloud: str, metadata: str) -> bool:
    """True when the cloud says that this machine ends. `metadata` is the server's base URL.

    AWS answers 404 until there is a notice, Google TRUE or FALSE. Raises OSError when the server does not answer.
    """
    if cloud == "gcp":
        path, headers = "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
        return _ask(metadata + path, headers).strip() == "TRUE"
    token = _ask(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        return bool(_ask(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=3) as answer:
        return str(answer.read().decode())


def own_node(address: str) -> str:
    """Hex id of the live node with this machine's address. Raises RuntimeError when the cluster knows none."""
    from ray._private.services import get_node_ip_address
    from ray._raylet import GcsClient

    here = get_node_ip_address(address)
    for node_id, node in GcsClient(address=address).get_all_node_info().items():
        if node.node_manager_address == here and node.state == 0:  # GcsNodeInfo.ALIVE
            return str(node_id.hex())
    raise RuntimeError(f"{address} knows no live node at {here}")


def drain(address: str, node_id: str, seconds: int) -> None:
    """Have the node left by `seconds` from now. Raises CalledProcessError when the cluster does not take it."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "drain-node", "--address", address, "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    subprocess.run([*command, "--reason-message", "spot notice", "--deadline-remaining-seconds", str(seconds)], check=True)


def main(cloud: str, address: str) -> int:
    """Watch until there is a notice, then drain and end."""
    while True:
        try:
            if noticed(cloud, METADATA[cloud]):
                break
        except OSError as error:  # the next question may be answered
            print(f"metadata: {error}", flush=True)
        time.sleep(POLL_S)
    drain(address, own_node(address), SECONDS[cloud])
    print("spot notice: this node is drained", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
