"""What readers of source formats return: one `SourceRow` or one `Reject` for each source row.

A reader is an iterator of raw rows and a function that parses one of them. Everything else is the same for all formats:
numbering, the rules for conversations, grouping, media checks, limits and tables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from voco.job.config import Ingest

SYSTEM_DROPPED = "system prompts dropped"  # a note of SourceRow
EVALUATION = {"val", "test"}  # splits in which the last answer is a reference and not part of the turns
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
encode_sorted = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode


class BadRow(Exception):
    """A source row that cannot become a conversation: a reason of `store/schemas.py` REASONS and a detail for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class DamagedArchive(ValueError):
    """A zip or tar file that cannot be read, or cannot be read further."""


@dataclass(frozen=True)
class Reject:
    """A source row that does not enter `samples/`."""

    source: str  # file and row, "mix.json:17": rows are counted from 0, without a header
    reason: str
    detail: str


@dataclass(frozen=True)
class SourceRow:
    """A source row that is one conversation about the media at `paths`."""

    source: str
    modality: str  # text, image or video
    paths: tuple[str, ...]  # normalised, relative to the media root, in placeholder order
    turns: tuple[tuple[str, str], ...]  # (role, text) as in the source; rows with equal media and turns are duplicates
    conversation: dict[str, Any]  # a `store/schemas.py` CONVERSATION
    location: str = ""  # where the medium is read from unless that is its path: bytes of a tar shard, a URL
    notes: tuple[str, ...] = ()  # what of the row does not reach the model, for the listing's counts


def sample_id(dataset: str, split: str, row: SourceRow) -> str:
    """32 hex digits, equal for rows with the same media paths and for text-only rows with the same turns."""
    content: Any = row.paths or row.turns
    return hashlib.sha256(encode([dataset, split, content]).encode()).hexdigest()[:32]


def normal_path(path: str) -> str:
    """A media path relative to the media root in its canonical form: `a/./b//c.jpg` becomes `a/b/c.jpg`.

    Raises BadRow(unsafe_path) for a path that could leave the root. Links are checked later, when the file is read.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or "://" in path or "\0" in path or ".." in parts:
        raise BadRow("unsafe_path", f"{path[:200]!r} is not a path below the media folder")
    if not parts:
        raise BadRow("bad_record", f"the media path is empty: {path[:200]!r}")
    return "/".join(parts)


def parse_rows(uri: str, raws: Iterable[Any], parse: Callable[[Any, int, str], SourceRow]) -> Iterator[SourceRow | Reject]:
    """Number the raw rows of a file and parse each: `parse(raw, index, source)` returns a SourceRow or raises BadRow."""
    name = uri.rsplit("/", 1)[-1]
    for index, raw in enumerate(raws):
        source = f"{name}:{index}"
        try:
            yield parse(raw, index, source)
        except BadRow as bad:
            yield Reject(source, bad.reason, bad.detail)


def category_and_extra(raw: dict[str, Any], own_keys: set[str]) -> tuple[str, dict[str, Any]]:
    """The `category` of a JSON row, "" unless it is a string, and for `extra` every other key that is not in `own_keys`."""
    extra = {key: value for key, value in raw.items() if key not in own_keys and key != "category"}
    category = raw.get("category", "")
    if not isinstance(category, str):
        extra["category"], category = category, ""
    return category, extra


def make_source_row(
    source: str,
    block: Ingest,
    *,
    modality: str,
    path: str | None = None,
    paths: Sequence[str] = (),
    turns: Sequence[tuple[str, str]],
    placeholder: str,
    answers: Sequence[str] = (),
    choices: Sequence[str] = (),
    source_id: str = "",
    category: str = "",
    extra: dict[str, Any] | None = None,
    location: str = "",
    system: str = "",
) -> SourceRow:
    """One conversation, checked by the rules that all formats share. Its media are `paths`, or the single `path`.

    A `system` prompt of the source goes to `extra`: a chat template has its own, and a counted note says that it was dropped.
    In the splits val and test a last answer leaves the turns; the references are `answers`, or else that answer.
    Raises BadRow: bad_record (text that UTF-8 cannot encode, an empty path), text_too_large, empty_text, bad_conversation
    (a training row without an answer), unsafe_path.
    """
    media = list(paths) if path is None else [path]
    if system.strip():
        extra = {**(extra or {}), "system": system}
    notes = encode_sorted(extra) if extra else "{}"
    _check_text([source_id, category, notes, *media, *answers, *choices, *(text for _, text in turns)], block.max_text_bytes)
    evaluation = block.split in EVALUATION
    _check_turns(turns, placeholder != "none", evaluation)
    shown: list[tuple[str, str]] = list(turns)
    references: list[str] = []
    if evaluation and turns[-1][0] == "assistant":
        shown, references = shown[:-1], list(answers) or [turns[-1][1]]
    conversation = {
        "source_id": source_id,
        "turns": [{"role": role, "text": text} for role, text in shown],
        "placeholder": placeholder,
        "answers": references,
        "choices": list(choices),
        "category": category,
        "extra": notes,
    }
    dropped = (SYSTEM_DROPPED,) if system.strip() else ()
    return SourceRow(source, modality, tuple(map(normal_path, media)), tuple(turns), conversation, location, dropped)


def _check_text(texts: list[str], limit: int) -> None:
    try:
        size = len("".join(texts).encode())
    except UnicodeEncodeError as error:  # a lone surrogate, which UTF-8 cannot encode
        raise BadRow("bad_record", f"text that is not Unicode: {error.reason}") from error
    if size > limit:
        raise BadRow("text_too_large", f"{size} bytes of text, more than ingest.max_text_bytes {limit}")


def _check_turns(turns: Sequence[tuple[str, str]], has_placeholder: bool, evaluation: bool) -> None:
    for index, (role, text) in enumerate(turns):
        # LLaVA writes "caption this" as a first turn that is the placeholder alone
        if not text.strip() and not (index == 0 and has_placeholder):
            raise BadRow("empty_text", f"turn {index} ({role}) has no text")
    if len(turns) == 1 and not evaluation:
        raise BadRow("bad_conversation", "there is no answer to learn from")
