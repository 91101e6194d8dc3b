"""Which formats say themselves where each medium lies."""

from __future__ import annotations

from voco.errors import Refused
from voco.ingest.formats.mmbench_tsv import TsvImages
from voco.ingest.media.download import DownloadLimits
from voco.ingest.media.image import LocatedMedia
from voco.ingest.media.tar import TarShards
from voco.ingest.media.web import WebMedia
from voco.job.config import Ingest

PLACED = ("webdataset", "cc3m_tsv", "mmbench_tsv")


def open_media_sources(block: Ingest, annotations: str, media: str | None) -> LocatedMedia | None:
    """What the media are read from, None for formats whose media lie at their paths. Raises Refused for media besides."""
    if block.format not in PLACED:
        return None
    if media is not None:
        raise Refused(f"inputs.media: {block.format} says itself where its media are; leave it out")
    if block.format == "webdataset":
        return TarShards(annotations)
    if block.format == "mmbench_tsv":
        return TsvImages(annotations)
    web = DownloadLimits(block.download_timeout_s, block.download_retries, block.allow_private_addresses, block.honour_noai)
    return WebMedia(web, block.download_threads, block.max_media_bytes)
