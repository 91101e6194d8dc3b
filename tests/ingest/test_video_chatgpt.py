"""How Video-ChatGPT's rows are read."""

import json
from typing import Any

import pytest

from voco.errors import Refused
from voco.ingest.formats.video_chatgpt import MARKER, clean_answer, parse, read, video_stem
from voco.ingest.source_row import BadRow, Reject, SourceRow
from voco.job.config import Ingest

TRAIN = Ingest(format="video_chatgpt", dataset="vc", max_text_bytes=2000)


def row(video: str = "v_AbCdEfGhIjK", question: str = "What then?", answer: str = "He waves.", **keys: Any) -> dict[str, Any]:
    return {"q": question, "a": answer, "video_id": video, **keys}


def test_golden_row() -> None:
    item = parse(row(category="order", level=2), 4, "vc.json:4", TRAIN)
    assert (item.modality, item.paths) == ("video", ("v_AbCdEfGhIjK",))
    assert item.conversation == {
        "source_id": "v_AbCdEfGhIjK",
        "turns": [{"role": "user", "text": "What then?"}, {"role": "assistant", "text": "He waves."}],
        "placeholder": "after", "answers": [], "choices": [], "category": "order", "extra": '{"level":2}',
    }  # fmt: skip


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_evaluation_row_ends_on_the_user(split: str) -> None:
    talk = parse(row(), 1, "vc.json:1", TRAIN.model_copy(update={"split": split})).conversation
    assert ([turn["role"] for turn in talk["turns"]], talk["answers"]) == (["user"], ["He waves."])


def test_the_placeholder_goes_by_the_row_number_of_the_file(tmp_path) -> None:
    path = tmp_path / "vc.json"
    path.write_text(json.dumps([row(), row(answer=""), row(), row()]))
    rows = list(read(str(path), TRAIN, None))
    assert [item.conversation["placeholder"] if isinstance(item, SourceRow) else item.reason for item in rows] == [
        "after", "empty_text", "after", "before",
    ]  # fmt: skip
    assert [item.source for item in rows] == [f"vc.json:{index}" for index in range(4)]
    assert isinstance(rows[1], Reject)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"He waves.\n{MARKER}", "He waves."),
        (f"He waves. {MARKER} \n", "He waves."),
        (f"{MARKER}\nHe waves.", "He waves."),
        (f"He\n{MARKER}\nwaves.", "He waves."),
        (f"He waves.{MARKER}{MARKER}", "He waves."),
        (" He\n waves. ", " He\n waves. "),
        (MARKER, ""),
    ],
)
def test_stray_markers_go(answer: str, expected: str) -> None:
    assert clean_answer(answer) == expected


def test_an_id_with_an_extension_is_the_same_video() -> None:
    assert {video_stem(name) for name in ("v_abc", "v_abc.mp4", "v_abc.mkv", " v_abc ")} == {"v_abc"}
    assert video_stem("vid1301.avi") == "vid1301"  # other sets have no prefix


BAD = {
    "a string": ("a", "bad_record"),
    "no question": ({"a": "x", "video_id": "v_a"}, "bad_record"),
    "an answer that is a number": (row() | {"a": 3}, "bad_record"),
    "no id": (row() | {"video_id": None}, "bad_record"),
    "an empty id": (row(video=" "), "bad_record"),
    "a prefix without an id": (row(video="v_"), "bad_record"),
    "an empty question": (row(question=" \n"), "empty_text"),
    "an empty answer": (row(answer="\n"), "empty_text"),
    "an answer that is a marker": (row(answer=MARKER), "empty_text"),
    "a long answer": (row(answer="x" * 2001), "text_too_large"),
    "a long extra": (row(note="x" * 2001), "text_too_large"),
    "a lone surrogate": (row(answer="\ud800"), "bad_record"),
    "a path that climbs": (row(video="v_/../../x"), "unsafe_path"),
    "a NUL": (row(video="v_a\0"), "unsafe_path"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str) -> None:
    raw, reason = BAD[name]
    with pytest.raises(BadRow) as caught:
        parse(raw, 0, "vc.json:0", TRAIN)
    assert caught.value.reason == reason
    assert caught.value.detail.encode()


@pytest.mark.parametrize("text", ["{}", '[{"q": 1}', b'["\xff"]'.decode("latin-1") + "x"])
def test_a_file_that_is_not_a_complete_list_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "vc.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(Refused, match=r"inputs.annotations: .*vc.json: "):
        list(read(str(path), TRAIN, None))
