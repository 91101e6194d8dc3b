"""Rows in the layouts of other trainers: real files of others, hand-written rows, and what is refused with a name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from real_data import SHARED

from voco.ingest.formats import chat_json, get_format, llava_json
from voco.ingest.layouts import ROW_LAYOUTS, recognise
from voco.ingest.source_row import BadRow, Reject, SourceRow
from voco.job.config import Ingest

CHAT = SHARED / "chat"
BLOCK = Ingest(format="chat_json", dataset="chat")


def parse(raw: Any) -> SourceRow:
    return chat_json.parse(raw, "chat.json:0", BLOCK)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


ASK, ANSWER = message("user", "<image>Who is it?"), message("assistant", "Ada.")
WHO = (("user", "Who is it?"), ("assistant", "Ada."))
IMAGE_URL = {"type": "image_url", "image_url": {"url": "1.jpg"}}
TEXT = {"type": "text", "text": "Who is it?"}

SAME = {
    "LLaMA-Factory": {"messages": [ASK, ANSWER], "images": ["1.jpg"]},
    "a single image": {"messages": [ASK, ANSWER], "image": "1.jpg"},
    "an image object": {"messages": [ASK, ANSWER], "images": [{"path": "1.jpg", "bytes": None}]},
    "content parts": {"messages": [message("user", [IMAGE_URL, TEXT]), ANSWER]},
    "parts without a path": {"messages": [message("user", [{"type": "image"}, TEXT]), ANSWER], "images": ["1.jpg"]},
    "parts with a path": {"messages": [message("user", [{"type": "image", "image": "file://1.jpg"}, TEXT]), ANSWER]},
    "query and response": {"query": "<image>Who is it?", "response": "Ada.", "images": ["1.jpg"]},
    "a query without placeholder": {"query": "Who is it?", "response": "Ada.", "images": ["1.jpg"]},
    "pairs": {"conversation": [{"human": "<image>Who is it?", "assistant": "Ada."}], "images": ["1.jpg"]},
    "LLaVA": {
        "image": "1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWho is it?"}, {"from": "gpt", "value": "Ada."}],
    },
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_row_in_every_layout(name: str) -> None:
    row = parse(SAME[name])
    assert (row.modality, row.paths, row.turns, row.notes) == ("image", ("1.jpg",), WHO, ())
    assert row.conversation["placeholder"] == "before"


def test_several_media_keep_the_order_of_their_placeholders() -> None:
    second = message("user", "And <image> here?")
    row = parse({"messages": [ASK, ANSWER, second, ANSWER], "images": ["1.jpg", "2.jpg"]})
    assert row.paths == ("1.jpg", "2.jpg")
    assert [text for _, text in row.turns] == ["Who is it?", "Ada.", "And  here?", "Ada."]
    clips = parse({"messages": [message("user", "<video><video>Which is longer?"), ANSWER], "videos": ["a.mp4", "b.avi"]})
    assert (clips.modality, clips.paths, clips.turns[0][1]) == ("video", ("a.mp4", "b.avi"), "Which is longer?")


def test_history_comes_before_the_query() -> None:
    row = parse({"query": "And now?", "response": "Later.", "history": [["<image>Hi", "Hello"]], "images": ["1.jpg"]})
    assert [text for _, text in row.turns] == ["Hi", "Hello", "And now?", "Later."]


@pytest.mark.parametrize("where", ["turn", "system", "system_prompt"])
def test_a_system_prompt_is_kept_beside_and_counted(where: str) -> None:
    raw: dict[str, Any] = {"messages": [ASK, ANSWER], "images": ["1.jpg"]}
    if where == "turn":
        raw["messages"] = [message("system", "Be brief."), ASK, ANSWER]
    else:
        raw[where] = "Be brief."
    row = parse(raw)
    assert row.turns == WHO
    assert json.loads(row.conversation["extra"]) == {"system": "Be brief."}
    assert row.notes == ("system prompts dropped",)


BAD = {
    "two placeholders, one image": (
        {"messages": [message("user", "<image><image>Hi"), ANSWER], "images": ["1.jpg"]},
        "bad_record",
    ),
    "a placeholder, no image": ({"messages": [ASK, ANSWER]}, "bad_record"),
    "an image, no placeholder": ({"messages": [message("user", "Hi"), ANSWER], "images": ["1.jpg"]}, "bad_record"),
    "a video placeholder, no video": ({"messages": [message("user", "<video>Hi"), ANSWER]}, "bad_record"),
    "images and videos": ({"messages": [ASK, ANSWER], "images": ["1.jpg"], "videos": ["1.mp4"]}, "unsupported_format"),
    "a picture in the JSON": ({"messages": [ASK, ANSWER], "images": ["data:image/png;base64,AAAA"]}, "unsupported_format"),
    "an image at a URL": ({"messages": [ASK, ANSWER], "images": ["http://host/1.jpg"]}, "unsafe_path"),
    "a sound": ({"messages": [message("user", [{"type": "input_audio"}, TEXT]), ANSWER]}, "unsupported_format"),
    "a tool's turn": ({"messages": [ASK, message("tool", "3"), ANSWER], "images": ["1.jpg"]}, "bad_conversation"),
    "two answers in a row": ({"messages": [ASK, ANSWER, ANSWER], "images": ["1.jpg"]}, "bad_conversation"),
    "no answer": ({"query": "Hi"}, "bad_conversation"),
    "an answer that is a number": ({"query": "Hi", "response": 3}, "bad_record"),
    "other keys": ({"prompt": "Hi", "completion": "Ho"}, "bad_record"),
    "a string": ("Hi", "bad_record"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str) -> None:
    raw, reason = BAD[name]
    with pytest.raises(BadRow) as caught:
        parse(raw)
    assert (caught.value.reason, bool(caught.value.detail)) == (reason, True)


def test_a_row_of_another_layout_is_refused_by_its_name() -> None:
    with pytest.raises(BadRow, match=r"looks like LLaMA-Factory's `messages`; use format chat_json"):
        llava_json.parse(SAME["LLaMA-Factory"], "mix.json:0", BLOCK)
    with pytest.raises(BadRow, match=r"looks like Video-ChatGPT's `q` and `a`; use format video_chatgpt"):
        parse({"q": "Who?", "a": "Ada", "video_id": "v_1"})


@pytest.mark.parametrize("layout", ROW_LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_names_a_format_that_exists(layout) -> None:
    assert get_format(layout.format)


@pytest.mark.skipif(not CHAT.exists(), reason="no ../shared/data")
@pytest.mark.parametrize(
    ("file", "format_name", "expected"),
    [
        ("llama-factory/mllm_demo.json", "chat_json", 6),
        ("llama-factory/mllm_video_demo.json", "chat_json", 3),
        ("qwen3-vl/single_images.json", "llava_json", 3),
        ("qwen3-vl/video.json", "llava_json", 3),
    ],
)
def test_real_files(file: str, format_name: str, expected: int, tmp_path) -> None:
    """Every row is read, from the list and from the same rows as JSON lines; the layout is recognised by its first row."""
    path = CHAT / file
    listed = json.loads(path.read_text())
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in listed))
    layout = recognise(listed[0])
    assert layout is not None
    assert layout.format == format_name
    block = Ingest(format=format_name, dataset="real")
    for uri in (path, lines):
        rows = list(get_format(format_name).read(str(uri), block, None))
        assert (len(rows), [row for row in rows if isinstance(row, Reject)]) == (expected, [])
        assert all(row.paths and "<" not in row.turns[0][1] for row in rows)
