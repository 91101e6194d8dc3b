"""Which formats say themselves where each medium lies."""

from __future__ import annotations

from voco.blocks import Ingest
from voco.errors import Refused
from voco.ingest.media import Places
from voco.ingest.tar import TarShards


def open_places(block: Ingest, annotations: str, media: str | None) -> Places | None:
    """What the media are read from, None for formats whose media lie at their paths. Raises Refused for media besides."""
    if block.format != "webdataset":
        return None
    if media is not None:
        raise Refused(f"inputs.media: {block.format} holds its media itself; leave it out")
    return TarShards(annotations)
