"""Real files of others, `../shared/data` beside the checkout or where VOCO_SHARED says; tests skip where they are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("VOCO_SHARED", Path(__file__).parents[2] / "shared")) / "data"


def shared_folder(name: str) -> Path:
    """A folder of SHARED; skips the test without it."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no ../shared/data/{name}")
    return folder
