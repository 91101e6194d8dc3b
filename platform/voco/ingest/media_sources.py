"""Opens the media that a format's annotations locate, and takes the limits on one medium from the job's block."""

from __future__ import annotations

from voco.errors import Refused
from voco.ingest.formats import get_format
from voco.ingest.media.archive import check_media
from voco.ingest.media.source import LocatedMedia, MediaLimits
from voco.job.config import Ingest


def open_media_sources(block: Ingest, annotations: str, media: str | None) -> LocatedMedia | None:
    """The format's media, or None when they are files in `inputs.media`.

    Raises Refused when the job gives both, or an archive that cannot be read.
    """
    check_media(media)
    open_media = get_format(block.format).open_media
    if open_media is None:
        return None
    if media is not None:
        raise Refused(f"inputs.media: expected nothing: {block.format} rows say where their media are")
    return open_media(block, annotations)


def media_limits(block: Ingest) -> MediaLimits:
    """The block's limits on one medium."""
    return MediaLimits(block.check, block.max_media_bytes, block.max_pixels, block.max_aspect, block.inline_max_bytes)
