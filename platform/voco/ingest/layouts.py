"""Which known layout a JSON row has, by its keys: for messages that name the format to use."""

from __future__ import annotations

from typing import Any, NamedTuple


class RowLayout(NamedTuple):
    """A layout of rows: what people call it, the format that reads it, and keys by which it is known with the types they have."""

    name: str
    format: str
    keys: dict[str, type | tuple[type, ...]]
    turn_keys: tuple[str, ...] = ()  # of the first turn, which is the first element of the first key


ROW_LAYOUTS = (
    RowLayout("LLaVA's `conversations`", "llava_json", {"conversations": list}, ("from", "value")),
    RowLayout("LLaMA-Factory's `messages`", "chat_json", {"messages": list}, ("role", "content")),
    RowLayout("ms-swift's `conversation`", "chat_json", {"conversation": list}, ("human", "assistant")),
    RowLayout("ms-swift's `query` and `response`", "chat_json", {"query": str, "response": str}),
    RowLayout("Video-ChatGPT's `q` and `a`", "video_chatgpt", {"q": str, "a": str, "video_id": str}),
    RowLayout("a video question set", "video_qa", {"video_name": str, "question": str, "question_id": (str, int)}),
    RowLayout("LLaVA's evaluation questions", "question_jsonl", {"question_id": (str, int), "image": str, "text": str}),
    RowLayout("evaluation questions", "question_jsonl", {"question_id": (str, int), "image": str, "question": str}),
)


def recognise(row: Any) -> RowLayout | None:
    """The row's layout, or None for a row that has none of them."""
    if not isinstance(row, dict):
        return None
    for layout in ROW_LAYOUTS:
        if all(isinstance(row.get(key), kind) for key, kind in layout.keys.items()) and _first_turn_has(row, layout):
            return layout
    return None


def _first_turn_has(row: dict[str, Any], layout: RowLayout) -> bool:
    turns = row[next(iter(layout.keys))]
    if not layout.turn_keys:
        return True
    return bool(turns) and isinstance(turns[0], dict) and all(key in turns[0] for key in layout.turn_keys)


def advice(row: Any, used: str) -> str:
    """` (looks like LLaMA-Factory's `messages`; use format chat_json)` for a row of a layout that format `used` does not read."""
    layout = recognise(row)
    return "" if layout is None or layout.format == used else f" (looks like {layout.name}; use format {layout.format})"
