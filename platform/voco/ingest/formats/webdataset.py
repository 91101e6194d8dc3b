"""WebDataset's tar shards, as img2dataset and video2dataset write them: members of one key in a row are one sample.

    000120034.jpg   000120034.json   000120034.txt     (or .mp4, .png, .webp, ...)

The caption is the .txt, else the `caption` of the .json, whose other keys go to `extra`; it becomes an answer to a short
request to describe the medium. The media stay where they are: the list holds shard, first byte and size. What was not
downloaded is mostly a gap in the keys, which is no row; a key with a .json and no medium is one, `download_failed`.
A shard that is cut or damaged ends with a reject that says where: how many samples were behind it nobody knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

from voco.ingest.formats import captions, webvid_csv
from voco.ingest.media.tar import Member, iterate_members, member_location, open_shard, shard_uris
from voco.ingest.source_row import BadRow, DamagedArchive, Reject, SourceRow, make_source_row, normal_path, parse_rows
from voco.job.config import Ingest

MODALITIES = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"), "image"),
    **dict.fromkeys(("mp4", "mkv", "webm", "mov", "avi"), "video"),
}
TEXTS = ("txt", "json")


@dataclass
class TarSample:
    """The members of one key: media by extension, texts by extension, and the first thing that is wrong with them."""

    key: str
    media: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    fault: BadRow | None = None


def read(uri: str, block: Ingest) -> Iterator[SourceRow | Reject]:
    """Every sample of every shard, in order. Raises Refused when there is no shard."""
    for shard in shard_uris(uri):
        yield from parse_rows(shard, _samples(shard, block), partial(_parse, shard, block))


def _parse(shard: str, block: Ingest, raw: TarSample, _: int, source: str) -> SourceRow:
    return parse(raw, shard, source, block)


def _samples(shard: str, block: Ingest) -> Iterator[TarSample]:
    held: TarSample | None = None
    with open_shard(shard) as handle:
        try:
            for member in iterate_members(handle):
                key, extension = split_key(member.name)
                if held is None or held.key != key:
                    if held is not None:
                        yield held
                    held = TarSample(key)
                _add(held, extension, member, handle, block.max_text_bytes)
        except DamagedArchive as error:
            if held is not None:
                yield held
            held = TarSample("", fault=BadRow("bad_record", f"{error}; what may lie behind it is lost"))
    if held is not None:
        yield held


def split_key(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset has them: at the first dot of the last part. Extensions in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _add(sample: TarSample, extension: str, member: Member, handle: IO[bytes], limit: int) -> None:
    """Take one more member; the sample's first fault stays."""
    if extension not in MODALITIES and extension not in TEXTS and not member.cut:
        return
    fault = None
    if member.cut:
        fault = BadRow("corrupt_media", f"{member.name[:200]!r}: cut short: the shard ends before its {member.size} bytes do")
    elif not member.regular:
        fault = BadRow("unsafe_path", f"{member.name[:200]!r}: a link or a device in the shard")
    elif extension in sample.media or extension in sample.texts:
        fault = BadRow("bad_record", f"{member.name[:200]!r} is twice in a row in the shard")
    elif extension in MODALITIES:
        sample.media[extension] = member
    elif member.size > limit:
        fault = BadRow("text_too_large", f"{member.size} bytes of {extension}, more than ingest.max_text_bytes {limit}")
    else:
        handle.seek(member.start)
        sample.texts[extension] = handle.read(member.size)
    sample.fault = sample.fault or fault


def parse(raw: TarSample, shard: str, source: str, block: Ingest) -> SourceRow:
    """One key's members as an item. Raises BadRow with the first thing that is wrong with them."""
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
    spoken = notes.pop("caption", None)
    if not caption and isinstance(spoken, str):
        caption = spoken.strip()
    modality = MODALITIES[extension]
    request, where = captions.image_request(identity) if modality == "image" else (webvid_csv.caption_request(identity), "after")
    notes.pop("key", None)
    return make_source_row(
        source, block, modality=modality, path=path, turns=[("user", request), ("assistant", caption)], placeholder=where,
        source_id=identity, extra=notes, place=member_location(shard, member),
    )  # fmt: skip


def _notes(raw: TarSample) -> dict[str, Any]:
    if "json" not in raw.texts:
        return {}
    try:
        notes = json.loads(raw.texts["json"])
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_record", f"{raw.key[:200]!r}: json: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(notes, dict):
        raise BadRow("bad_record", f"{raw.key[:200]!r}: json: expected an object, got {type(notes).__name__}")
    return notes
