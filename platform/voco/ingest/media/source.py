"""The protocols of media sources, and the limits on one medium that every source and every kind of media shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from voco.ingest.source_row import BadRow


@dataclass(frozen=True)
class MediaLimits:
    """Limits on one medium, from the keys of the job's `ingest` block, which has their defaults."""

    check: str  # header or full
    max_media_bytes: int
    max_pixels: int  # Pillow itself rejects more than 357,913,940
    max_aspect: float  # longer side over shorter: images are padded to squares before a model sees them
    inline_max_bytes: int  # a larger medium goes to `blobs/`


class MediaSource(Protocol):
    """Where media are read from: a folder (`folder.MediaRoot`), an archive (`archive.ZipArchive`), a member of a shard, a URL."""

    def read(self, path: str, limit: int) -> bytes:
        """The bytes at a normalised path, at most `limit`. Raises BadRow."""


class LocatedMedia(Protocol):
    """Media at locations that the annotations name: `tar.TarShards`, `web.WebMedia`, `formats/mmbench_tsv.py` TsvImages."""

    def sources(self, locations: list[str]) -> Iterator[MediaSource]:
        """One source for each location of the work list, in order."""


def check_size(path: str, size: int, limit: int) -> None:
    """Raises BadRow(media_too_large) for a file of more than `limit` bytes."""
    if size > limit:
        raise BadRow("media_too_large", f"{path}: {size} bytes, more than ingest.max_media_bytes {limit}")


def check_dimensions(width: int, height: int, limits: MediaLimits) -> None:
    """Raises BadRow(media_too_large) for more than `max_pixels`, and for a strip that padding would make huge."""
    if width * height > limits.max_pixels:
        raise BadRow("media_too_large", f"{width} x {height} pixels, more than ingest.max_pixels {limits.max_pixels}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadRow("media_too_large", f"{width} x {height} pixels, longer than ingest.max_aspect {limits.max_aspect:g} to 1")
