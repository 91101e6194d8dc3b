"""The working directory as Ray uploads it with a job, measured before it is sent.

Ray packs the directory into a zip without compression and sends it in one request. The dashboard refuses a request of more than
100 MiB with HTTP 413, although Ray documents and prints 512 MiB, the limit of another way of uploading. The walk through the
directory and its excludes are Ray's own, private functions of ray 2.60: `.gitignore` and `.rayignore` at every level, and Ray's
default excludes. `tests/commands/test_upload_size.py` compares the size with a package that Ray makes.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from voco.errors import Refused
from voco.report.table import bytes_text

ENTRY_BYTES = 30 + 46  # of a zip for each file, besides its content and twice its name: APPNOTE.TXT 6.3.10, 4.3.7 and 4.3.12
END_BYTES = 22  # 4.3.16
LARGEST = 5  # files that the message names


def package_sizes(directory: str) -> dict[str, int]:
    """Bytes of each file that Ray would send, by path in the directory; an empty directory is one of 0 bytes, with a slash."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    root = Path(directory).absolute()
    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        name = path.relative_to(root).as_posix()
        if path.is_file():
            sizes[name] = path.stat().st_size
        elif path.is_dir() and next(path.iterdir(), None) is None:
            sizes[f"{name}/"] = 0

    excludes = [packaging._get_excludes(root, ray_constants.get_runtime_env_default_excludes())]
    gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    packaging._dir_travel(root, excludes, add, include_gitignore=gitignore, logger=logging.getLogger(__name__))
    return sizes


def package_bytes(sizes: dict[str, int]) -> int:
    """Bytes of the zip with these files. Exact below 4 GiB and 65,535 files, where a zip needs no further records."""
    return END_BYTES + sum(ENTRY_BYTES + 2 * len(name.encode()) + size for name, size in sizes.items())


def check_upload_size(directory: str) -> None:
    """Raises Refused, with the size and the largest files, for a directory that the dashboard would not take."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    sizes = package_sizes(directory)
    total = package_bytes(sizes)
    if total <= DASHBOARD_CLIENT_MAX_SIZE:
        return
    largest = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:LARGEST]
    shown = ", ".join(f"{name} {bytes_text(size)}" for name, size in largest)
    limit = f"a Ray dashboard takes at most {DASHBOARD_CLIENT_MAX_SIZE:,} ({bytes_text(DASHBOARD_CLIENT_MAX_SIZE)})"
    raise Refused(
        f"{directory}: {len(sizes):,} files, {total:,} bytes, would be uploaded with the job, and {limit}; "
        f"leave out what it does not need with a .rayignore, in the format of .gitignore; the largest: {shown}"
    )
