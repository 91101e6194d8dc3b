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


class TooLarge(BadRow):
    """media_too_large of a file by its size, known before it is read."""

    def __init__(self, path: str, size: int, limit: int) -> None:
        super().__init__("media_too_large", f"{path}: {size} bytes, more than ingest.max_media_bytes {limit}")
        self.path = path
        self.size = size


class MediaSource(Protocol):
    """Where media are read from: a folder (`folder.MediaRoot`), an archive (`archive.ZipArchive`), a member of a shard, a URL."""

    def read(self, path: str, limit: int) -> bytes:
        """The bytes at a normalised path, at most `limit`. Raises BadRow, for a larger file TooLarge."""


class OpenedMedia(MediaSource, Protocol):
    """The media of a job that are files in `inputs.media`."""

    @property
    def concurrent(self) -> bool:
        """True where several threads may read at once, and it pays: the media are in S3."""

    def expect(self, paths: list[str]) -> None:
        """Names the media that will be read next, in order, so that those that lie close together are read by one request."""


class LocatedMedia(Protocol):
    """Media at locations that the annotations name: `tar.TarShards`, `web.WebMedia`, `formats/mmbench_tsv.py` TsvImages."""

    @property
    def concurrent(self) -> bool:
        """As `OpenedMedia.concurrent`, of the sources."""

    def sources(self, locations: list[str]) -> Iterator[MediaSource]:
        """A source for each location of the work list, in order."""


def check_size(path: str, size: int, limit: int) -> None:
    """Raises TooLarge for a file of more than `limit` bytes."""
    if size > limit:
        raise TooLarge(path, size, limit)


def check_dimensions(width: int, height: int, limits: MediaLimits) -> None:
    """Raises BadRow(media_too_large) for more than `max_pixels`, and for a strip that padding would make huge."""
    if width * height > limits.max_pixels:
        raise BadRow("media_too_large", f"{width} x {height} pixels, more than ingest.max_pixels {limits.max_pixels}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadRow("media_too_large", f"{width} x {height} pixels, longer than ingest.max_aspect {limits.max_aspect:g} to 1")
