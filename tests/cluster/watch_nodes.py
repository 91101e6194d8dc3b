"""Prints the live nodes of a cluster twice a second, a JSON line each: [{id, draining, <label>: value}, ...]. Run as a script.

A separate process, because Ray reads the token once per process, at the first call.
"""

from __future__ import annotations

import json
import sys
import time

from ray._raylet import GcsClient  # private, as in ray_private.py


def main(address: str) -> None:
    """Print until the process is killed."""
    client = GcsClient(address=address)
    while True:
        draining = {node_id if isinstance(node_id, str) else node_id.hex() for node_id in client.get_draining_nodes()}
        nodes = []
        for node_id, node in client.get_all_node_info().items():
            if node.state == 0:  # GcsNodeInfo.ALIVE
                nodes.append({"id": node_id.hex(), "draining": node_id.hex() in draining, **dict(node.labels)})
        print(json.dumps(nodes), flush=True)
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1])
