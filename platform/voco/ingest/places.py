"""Which formats say themselves where each medium lies."""

from __future__ import annotations

from voco.blocks import Ingest
from voco.errors import Refused
from voco.ingest.download import Web
from voco.ingest.media import Places
from voco.ingest.mmbench_tsv import TsvImages
from voco.ingest.tar import TarShards
from voco.ingest.web_media import WebMedia

PLACED = ("webdataset", "cc3m_tsv", "mmbench_tsv")


def open_places(block: Ingest, annotations: str, media: str | None) -> Places | None:
    """What the media are read from, None for formats whose media lie at their paths. Raises Refused for media besides."""
    if block.format not in PLACED:
        return None
    if media is not None:
        raise Refused(f"inputs.media: {block.format} says itself where its media are; leave it out")
    if block.format == "webdataset":
        return TarShards(annotations)
    if block.format == "mmbench_tsv":
        return TsvImages(annotations)
    web = Web(block.download_timeout_s, block.download_retries, block.allow_private_addresses, block.honour_noai)
    return WebMedia(web, block.download_threads, block.max_media_bytes)
