"""WebDataset's tar shards, as img2dataset and video2dataset write them: consecutive members of one key are a sample.

    000120034.jpg   000120034.json   000120034.txt     (or .mp4, .png, .webp, ...)

The caption is the .txt, or else the `caption` of the .json, whose other keys go to `extra`. It becomes the answer to a short
request to describe the medium. The work list has shard, first byte and size of each medium; a worker reads it there. A failed
download usually leaves a gap in the keys, which is not a row; a key with a .json but no medium is the reject `download_failed`.
A shard that is truncated or damaged ends with a reject that says where; the number of samples after that point is unknown.

As in WebDataset, a key ends at the first dot of the file name, and names without a key (`._000120034.jpg`, `.DS_Store`, LICENSE)
are no members: they do not end a sample. Two faults of shards that were packed by hand are named in the reject of every group:
members of a key that are not adjacent, and base names with a dot (`IMG.0001.jpg` has the key `IMG`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
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
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"), "image"),
    **dict.fromkeys((extension.removeprefix(".") for extension in VIDEO_EXTENSIONS), "video"),
}
TEXTS = ("txt", "json")
METADATA_FOLDERS = {"__MACOSX", "PaxHeader", "PaxHeaders"}  # `PaxHeaders.1234/` too: what tools without pax make of its headers
SCATTERED = "its members are not adjacent in the shard, as WebDataset needs them: pack the files in the order of their names"


@dataclass
class TarSample:
    """The members of one key that follow each other: media and texts by extension, and their first fault."""

    key: str
    media: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    dotted: dict[str, str] = field(default_factory=dict)  # base name with a dot -> its first member
    fault: BadRow | None = None
    scattered: bool = False  # other members of its key lie elsewhere in the shard

    @property
    def complete(self) -> bool:
        """True when it has a medium and a text that may be its caption."""
        return bool(self.media and self.texts)


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every sample of every shard, in order. Raises Refused when there is no shard."""
    for shard in shard_uris(uri):
        yield from parse_rows(shard, _samples(shard, block), partial(_parse, shard, block))


def _parse(shard: str, block: Ingest, raw: TarSample, _: int, source: str) -> SourceRow:
    return parse(raw, shard, source, block)


def _samples(shard: str, block: Ingest) -> Iterator[TarSample]:
    scattered: set[str] | None = None  # known once a sample is incomplete: then the shard's headers are read again
    with open_shard(shard) as handle:
        for sample in _groups(handle, block.max_text_bytes):
            if sample.fault is None and not sample.complete:
                scattered = _scattered_keys(handle) if scattered is None else scattered
                sample.scattered = sample.key in scattered
            yield from _by_base_name(sample)


def _groups(handle: IO[bytes], text_limit: int) -> Iterator[TarSample]:
    """Consecutive members of one key. The caller may read from the handle between two of them."""
    sample: TarSample | None = None
    try:
        for member in iterate_members(handle):
            if not has_key(member.name) and not member.cut:
                continue
            key, extension = split_key(member.name)
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = TarSample(key)
            _add(sample, extension, member, handle, text_limit)
    except DamagedArchive as error:
        if sample is not None:
            yield sample
        sample = TarSample("", fault=BadRow("bad_record", f"{error}; any samples after that are lost"))
    if sample is not None:
        yield sample


def _scattered_keys(handle: IO[bytes]) -> set[str]:
    """The keys with members that are not adjacent."""
    earlier: set[str] = set()
    scattered: set[str] = set()
    last: str | None = None
    with suppress(DamagedArchive):  # as far as the shard can be read
        for name in (member.name for member in iterate_members(handle) if has_key(member.name)):
            key, _ = split_key(name)
            if key != last and key in earlier:
                scattered.add(key)
            earlier.add(key)
            last = key
    return scattered


def _by_base_name(sample: TarSample) -> Iterator[TarSample]:
    """The sample; or, when all its members are named with dots, a faulty one for each base name: they share a key by mistake."""
    if sample.media or sample.texts or sample.fault is not None or not sample.dotted:
        yield sample
        return
    for stem, name in sample.dotted.items():
        detail = f"{name[:200]!r}: a dot in its base name: WebDataset's key is {sample.key[:100]!r}; name it without"
        yield TarSample(stem, fault=BadRow("bad_record", detail))


def has_key(name: str) -> bool:
    """False for names that WebDataset skips, hidden ones and ones without an extension, and for a tar's own metadata."""
    *folders, last = name.split("/")
    stem, dot, _ = last.partition(".")
    return bool(stem and dot) and not any(folder.split(".")[0] in METADATA_FOLDERS for folder in folders)


def split_key(name: str) -> tuple[str, str]:
    """Key and extension as in WebDataset: split at the first dot of the file name. The extension is in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _add(sample: TarSample, extension: str, member: Member, handle: IO[bytes], limit: int) -> None:
    """Add a member. The sample keeps its first fault."""
    if extension not in MODALITIES and extension not in TEXTS and not member.cut:
        inner, _, last = extension.rpartition(".")
        if inner and (last in MODALITIES or last in TEXTS):
            sample.dotted.setdefault(f"{sample.key}.{inner}", member.name)
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
    if raw.scattered:
        shown = raw.key[:200].encode("utf-8", "backslashreplace").decode()
        raise BadRow("bad_record", f"{shown!r}: {SCATTERED}")
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
