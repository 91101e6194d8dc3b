"""WebDataset's tar shards, as img2dataset and video2dataset write them: consecutive members of one key are a sample.

    000120034.jpg   000120034.json   000120034.txt     (or .mp4, .png, .webp, ...)

The caption is the .txt, or else the `caption` of the .json, whose other keys go to `extra`. It becomes the answer to a short
request to describe the medium. The work list has shard, first byte and size of each medium; a worker reads it there. A failed
download usually leaves a gap in the keys, which is not a row; a key with a .json but no medium is the reject `download_failed`.
A shard that is truncated or damaged ends with a reject that says where; the number of samples after that point is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

from voco.errors import message_line
from voco.ingest.captions import image_request, video_request
from voco.ingest.formats import Format
from voco.ingest.media.tar import Member, TarShards, iterate_members, member_location, open_shard, shard_uris
from voco.ingest.source_row import BadRow, DamagedArchive, Reject, SourceRow, make_source_row, normal_path, parse_rows
from voco.job.config import Ingest
from voco.video.extensions import VIDEO_EXTENSIONS

MODALITIES = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"), "image"),
    **dict.fromkeys((extension.removeprefix(".") for extension in VIDEO_EXTENSIONS), "video"),
}
TEXTS = ("txt", "json")


@dataclass
class TarSample:
    """The members of one key: media and texts by extension, and their first fault."""

    key: str
    media: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    fault: BadRow | None = None


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every sample of every shard, in order. Raises Refused when there is no shard."""
    for shard in shard_uris(uri):
        yield from parse_rows(shard, _samples(shard, block), partial(_parse, shard, block))


def _parse(shard: str, block: Ingest, raw: TarSample, _: int, source: str) -> SourceRow:
    return parse(raw, shard, source, block)


def _samples(shard: str, block: Ingest) -> Iterator[TarSample]:
    sample: TarSample | None = None
    with open_shard(shard) as handle:
        try:
            for member in iterate_members(handle):
                key, extension = split_key(member.name)
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = TarSample(key)
                _add(sample, extension, member, handle, block.max_text_bytes)
        except DamagedArchive as error:
            if sample is not None:
                yield sample
            sample = TarSample("", fault=BadRow("bad_record", f"{error}; any samples after that are lost"))
    if sample is not None:
        yield sample


def split_key(name: str) -> tuple[str, str]:
    """Key and extension as in WebDataset: split at the first dot of the file name. The extension is in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _add(sample: TarSample, extension: str, member: Member, handle: IO[bytes], limit: int) -> None:
    """Add a member. The sample keeps its first fault."""
    if extension not in MODALITIES and extension not in TEXTS and not member.cut:
        return
    fault = None
    if member.cut:
        fault = BadRow("corrupt_media", f"{member.name[:200]!r}: truncated: the shard ends before its {member.size} bytes do")
    elif not member.regular:
        fault = BadRow("unsafe_path", f"{member.name[:200]!r}: a link or a device in the shard")
    elif extension in sample.media or extension in sample.texts:
        fault = BadRow("bad_record", f"{member.name[:200]!r}: its key has two members with this extension")
    elif extension in MODALITIES:
        sample.media[extension] = member
    elif member.size > limit:
        fault = BadRow("text_too_large", f"{member.size} bytes of {extension}, more than ingest.max_text_bytes {limit}")
    else:
        handle.seek(member.start)
        sample.texts[extension] = handle.read(member.size)
    sample.fault = sample.fault or fault


def parse(raw: TarSample, shard: str, source: str, block: Ingest) -> SourceRow:
    """One key's members as a SourceRow. Raises BadRow for their first fault."""
    if raw.fault is not None:
        raise BadRow(raw.fault.reason, raw.fault.detail.encode("utf-8", "backslashreplace").decode())
    notes = _notes(raw)
    if not raw.media:
        status = notes.get("status")
        if status not in (None, "success"):
            raise BadRow("download_failed", f"{raw.key[:200]!r}: {status}: {notes.get('error_message')}"[:300])
        raise BadRow("missing_media", f"{raw.key[:200]!r}: no image or video among its members")
    if len(raw.media) > 1:
        raise BadRow("bad_record", f"{raw.key[:200]!r}: expected one image or video, got {', '.join(sorted(raw.media))}")
    ((extension, member),) = raw.media.items()
    path = f"{raw.key}.{extension}"
    identity = normal_path(path).removesuffix(f".{extension}")
    caption = raw.texts.get("txt", b"").decode("utf-8", "surrogateescape").strip()
    json_caption = notes.pop("caption", None)
    if not caption and isinstance(json_caption, str):
        caption = json_caption.strip()
    modality = MODALITIES[extension]
    request, placeholder = image_request(identity) if modality == "image" else (video_request(identity), "after")
    notes.pop("key", None)
    return make_source_row(
        source, block, modality=modality, path=path, turns=[("user", request), ("assistant", caption)], placeholder=placeholder,
        source_id=identity, extra=notes, location=member_location(shard, member),
    )  # fmt: skip


def _notes(raw: TarSample) -> dict[str, Any]:
    if "json" not in raw.texts:
        return {}
    try:
        notes = json.loads(raw.texts["json"])
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_record", f"{raw.key[:200]!r}: json: {message_line(error)}") from error
    if not isinstance(notes, dict):
        raise BadRow("bad_record", f"{raw.key[:200]!r}: json: expected an object, got {type(notes).__name__}")
    return notes


FORMAT = Format(read, missing_share=1.0, open_media=lambda block, annotations: TarShards(annotations))
