"""What every source format is read into: one `Item` or one `Reject` for each source row, nothing else.

A new format is one more reader that yields these; grouping, media checks, limits and tables stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


class BadRow(Exception):
    """A source row that cannot become a conversation: a reason of `voco.rows.REASONS` and a detail for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Reject:
    """A source row that is left out."""

    source: str  # file and row: "mix.json:17", rows counted from 0
    reason: str
    detail: str


@dataclass(frozen=True)
class Item:
    """A source row that is one conversation about the media at `paths`."""

    source: str
    modality: str  # text, image or video
    paths: tuple[str, ...]  # normalised, relative to the media root, in placeholder order
    turns: tuple[tuple[str, str], ...]  # (role, text) as the source has them: what makes two rows equal
    conversation: dict[str, Any]  # one `voco.rows.CONVERSATION`


def sample_id(dataset: str, split: str, item: Item) -> str:
    """32 hex digits: rows about the same media paths, or text-only rows with the same turns, are one sample."""
    about: Any = item.paths or item.turns
    text = json.dumps([dataset, split, about], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def normal_path(path: str) -> str:
    """A media path in its one spelling, relative to the media root: `a/./b//c.jpg` is `a/b/c.jpg`.

    Raises BadRow(unsafe_path) for a path that could leave the root; links are followed, and checked, when it is read.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or "://" in path or "\0" in path or ".." in parts:
        raise BadRow("unsafe_path", f"{path[:200]!r} is not a path below the media folder")
    if not parts:
        raise BadRow("bad_record", f"the media path is empty: {path[:200]!r}")
    return "/".join(parts)
