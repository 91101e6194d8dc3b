"""What rows of chat datasets share: the media of a row, its turns, and placeholders that must agree with the media."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from voco.ingest.source_row import BadRow

IMAGE, VIDEO = "<image>", "<video>"
MARKS = {"image": IMAGE, "video": VIDEO}
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
UNREAD_KEYS = ("images", "image_path", "image_paths", "videos", "video_path", "image_file", "img")  # where others put the path

Turns = list[tuple[str, str]]


def paths_of(value: Any, key: str) -> list[str]:
    """Paths from a path, an object with `path` or `url`, or a list of them; none for null. Raises BadRow(bad_record)."""
    if value is None:
        return []
    if isinstance(value, list):
        return [path for item in value for path in paths_of(item, key)]
    if isinstance(value, dict):
        value = next((value[name] for name in ("path", "url", "image", "video") if isinstance(value.get(name), str)), None)
    if not isinstance(value, str):
        raise BadRow("bad_record", f"{key}: expected a path or a list of paths, got {type(value).__name__}")
    if value.startswith("data:"):
        raise BadRow("unsupported_format", f"{key}: a picture inside the JSON; put it into a file and name the file")
    return [value.removeprefix("file://")]


def single_modality(images: Sequence[str], videos: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The row's modality and its media in the order of their placeholders. Raises BadRow for images and videos in one row."""
    if images and videos:
        raise BadRow("unsupported_format", "images and videos in one row")
    return ("image", tuple(images)) if images else ("video", tuple(videos)) if videos else ("text", ())


def alternate(turns: Turns) -> tuple[Turns, str]:
    """User and assistant in turn, from the first user turn on, and the text of a system turn before it.

    A first answer without a question is dropped, as LLaVA does. Raises BadRow(bad_conversation).
    """
    system = ""
    if turns and turns[0][0] == "system":
        (_, system), turns = turns[0], turns[1:]
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    if not turns:
        raise BadRow("bad_conversation", "there is no human turn")
    for index, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[index % 2]:
            raise BadRow("bad_conversation", f"turn {index}: expected {('user', 'assistant')[index % 2]}, got {role}")
    return turns, system


def take_placeholders(turns: Turns, mark: str, media: int, raw: dict[str, Any]) -> tuple[Turns, str]:
    """The turns without their placeholders, and where the first one stood: before or after its turn's text, or none.

    LLaVA moves a placeholder inside a sentence to the front; ours all stand before the text, in their order.
    Raises BadRow(bad_record) unless the user's turns have exactly one placeholder for each medium.
    """
    count = sum(text.count(mark) for role, text in turns if role == "user")
    if count != media:
        other = next((key for key in UNREAD_KEYS if raw.get(key)), None)
        elsewhere = f"; the row has `{other}`" if other and not media else ""
        raise BadRow("bad_record", f"{count} x {mark} in the text for {media} media{elsewhere}")
    if not media:
        return turns, "none"
    position = ""
    taken: Turns = []
    for role, text in turns:
        while role == "user" and mark in text:
            text, position_here = take_placeholder(text, mark)
            position = position or position_here
        taken.append((role, text))
    return taken, position if media == 1 else "before"


def take_placeholder(text: str, mark: str) -> tuple[str, str]:
    """The turn without a placeholder `mark` and the newline next to it, and the placeholder's position.

    LLaVA moves a placeholder from inside a sentence to the front, so its position is `before`.
    """
    if text.lstrip().startswith(mark):
        head, tail = text.split(mark, 1)
        return head + tail.removeprefix("\r").removeprefix("\n"), "before"
    if text.rstrip().endswith(mark):
        head, tail = text.rsplit(mark, 1)
        return head.removesuffix("\n").removesuffix("\r") + tail, "after"
    if mark in text:
        return text.replace(mark, "", 1), "before"
    return text, "none"


def row_identity(raw: dict[str, Any]) -> str:
    """The row's `id` as text, "" without it. Raises BadRow(bad_record)."""
    value = raw.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("bad_record", f"id: expected a string or an integer, got {type(value).__name__}")
    return str(value)
