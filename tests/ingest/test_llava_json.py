"""How one LLaVA row is read."""

import json

import pytest
from ingest.source import row

from voco.errors import Refused
from voco.ingest.chat_rows import take_placeholder
from voco.ingest.formats.llava_json import parse, read
from voco.ingest.source_row import BadRow, Reject, SourceRow, normal_path, sample_id
from voco.job.config import Ingest

TRAIN = Ingest(format="llava_json", dataset="mix", max_text_bytes=2000)
TEST = TRAIN.model_copy(update={"split": "test"})


@pytest.mark.parametrize(
    ("text", "prompt", "position"),
    [
        ("<image>\nWhat?", "What?", "before"),
        ("<image>\r\nWhat?", "What?", "before"),
        ("<image>\n\nWhat?\n", "\nWhat?\n", "before"),
        ("<image>What?", "What?", "before"),
        ("What?\n<image>", "What?", "after"),
        ("What?\n\n<image>", "What?\n", "after"),
        ("Look at <image> now", "Look at  now", "before"),
        ("<image>\nSpell <image> and <voco>", "Spell <image> and <voco>", "before"),
        ("Spell <image>\n<image>", "Spell <image>", "after"),
        ("No mark at all\n", "No mark at all\n", "none"),
        ("<image>", "", "before"),
    ],
)
def test_placeholder(text: str, prompt: str, position: str) -> None:
    assert take_placeholder(text, "<image>") == (prompt, position)
    assert take_placeholder(text.replace("<image>", "<video>"), "<video>") == (prompt.replace("<image>", "<video>"), position)


@pytest.mark.parametrize(
    ("raw", "detail"),
    [
        (row(7, None, "<image>\nSay <voco>", "a"), "1 x <image> in the text for 0 media"),
        ({**row(7, None, "<image>\nWho?", "Ada"), "image": None}, "1 x <image> in the text for 0 media"),
        ({**row(7, None, "<image>\nWho?", "Ada"), "image_path": "x.jpg"}, "the row has `image_path`"),
        ({**row(7, None, "<image>\nWho?", "Ada"), "images": ["x.jpg"]}, "the row has `images`"),
        (row(7, None, "<video>\nWho?", "Ada"), "1 x <video> in the text for 0 media"),
        (row("a", "x.jpg", "Who?", "Ada"), "0 x <image> in the text for 1 media"),
        (row("a", "x.jpg", "<image>\nHi", "<image>", "And <image>?", "Ada"), "2 x <image> in the text for 1 media"),
    ],
)
def test_placeholders_and_media_must_agree(raw: dict, detail: str) -> None:
    with pytest.raises(BadRow, match=detail.replace("`", ".")) as caught:
        parse(raw, "mix.json:0", TRAIN)
    assert caught.value.reason == "bad_record"


def test_several_images_and_answers_that_spell_a_mark() -> None:
    raw = {
        **row("a", None, "<image>\n<image>\nWhich is older?", "The <image> on the left", "And <voco>?", "b"),
        "image": ["x.jpg", "y.jpg"],
    }
    item = parse(raw, "mix.json:0", TRAIN)
    assert (item.modality, item.paths) == ("image", ("x.jpg", "y.jpg"))
    assert [text for _, text in item.turns] == ["Which is older?", "The <image> on the left", "And <voco>?", "b"]
    assert item.conversation["placeholder"] == "before"


def test_speakers_of_others_and_a_system_turn() -> None:
    turns = [("system", "Be brief."), ("user", "<image>\nWho?"), ("assistant", "Ada")]
    raw = {"image": "x.jpg", "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    item = parse(raw, "mix.json:0", TRAIN)
    assert item.turns == (("user", "Who?"), ("assistant", "Ada"))
    assert (item.conversation["extra"], item.notes) == ('{"system":"Be brief."}', ("system prompts dropped",))


def test_leading_answer_is_dropped() -> None:
    raw = row("a", "x.jpg", "<image>\nHi", "Ho")
    raw["conversations"].insert(0, {"from": "gpt", "value": "Welcome"})
    assert parse(raw, "mix.json:0", TRAIN).turns == (("user", "Hi"), ("assistant", "Ho"))


def test_evaluation_row_ends_on_the_user() -> None:
    raw = {**row("a", "x.jpg", "<image>\nHi", "Ho", "Which?", "Red"), "category": "colour", "level": 3, "b": [1]}
    talk = parse(raw, "mix.json:0", TEST).conversation
    assert [turn["text"] for turn in talk["turns"]] == ["Hi", "Ho", "Which?"]
    assert (talk["answers"], talk["category"], talk["extra"]) == (["Red"], "colour", '{"b":[1],"level":3}')
    unlabelled = parse(row("a", "x.jpg", "<image>\nHi"), "mix.json:0", TEST).conversation
    assert (len(unlabelled["turns"]), unlabelled["answers"]) == (1, [])


@pytest.mark.parametrize(
    ("path", "text", "stem", "prompt", "position"),
    [
        ("012301_012350/7.mp4", "Say what is shown.\n<image>", "012301_012350/7.mp4", "Say what is shown.", "after"),
        ("v_a.pkl", "<video>\nHow many <image>?", "v_a", "How many <image>?", "before"),
        ("v_a.mp4", "Who?\n<video>", "v_a.mp4", "Who?", "after"),
    ],
    ids=["LLaMA-VID's WebVid", "Video-ChatGPT's features", "Video-ChatGPT's placeholder"],
)
def test_a_video_row(path: str, text: str, stem: str, prompt: str, position: str) -> None:
    raw = {**row(7, None, text, "A boat\nQA_GT_caption_based_noisy"), "video": path}
    item = parse(raw, "mix.json:0", TRAIN)
    assert (item.modality, item.paths) == ("video", (stem,))
    assert item.turns == (("user", prompt), ("assistant", "A boat"))
    assert (item.conversation["placeholder"], item.conversation["source_id"]) == (position, "7")
    assert item.conversation["extra"] == "{}"


BAD = {
    "a string": ("a", "bad_record"),
    "a list": ([1], "bad_record"),
    "null": (None, "bad_record"),
    "no conversations": ({"id": 1, "image": "x.jpg"}, "bad_record"),
    "conversations an object": ({"conversations": {}}, "bad_record"),
    "a turn that is a string": ({"conversations": ["Hi"]}, "bad_record"),
    "a turn without value": ({"conversations": [{"from": "human"}]}, "bad_record"),
    "a value that is a number": ({"conversations": [{"from": "human", "value": 3}]}, "bad_record"),
    "id a list": ({**row(1, None, "a", "b"), "id": [1]}, "bad_record"),
    "id true": ({**row(1, None, "a", "b"), "id": True}, "bad_record"),
    "image a list": ({**row(1, None, "a", "b"), "image": ["x.jpg", "y.jpg"]}, "bad_record"),
    "image empty": (row(1, "", "<image>\na", "b"), "bad_record"),
    "a row of LLaMA-Factory": ({"messages": [{"role": "user", "content": "Hi"}]}, "bad_record"),
    "a lone surrogate": (row(1, None, "a\ud800", "b"), "bad_record"),
    "an image and a video": ({**row(1, "x.jpg", "a", "b"), "video": "x.mp4"}, "unsupported_format"),
    "video a list": ({**row(1, None, "a", "b"), "video": ["x.mp4"]}, "bad_record"),
    "video of features without a name": ({**row(1, None, "<video>\na", "b"), "video": ".pkl"}, "bad_record"),
    "a video that climbs": ({**row(1, None, "<image>\na", "b"), "video": "../x.mp4"}, "unsafe_path"),
    "no turns": ({"conversations": []}, "bad_conversation"),
    "only an answer": ({"conversations": [{"from": "gpt", "value": "a"}]}, "bad_conversation"),
    "two questions in a row": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "bad_conversation",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "robot", "value": "b"}]},
        "bad_conversation",
    ),
    "no answer": (row(1, None, "a"), "bad_conversation"),
    "an empty answer": (row(1, "x.jpg", "<image>\na", " \n"), "empty_text"),
    "an image without placeholder": (row(1, "x.jpg", "", "a"), "bad_record"),
    "an empty question": (row(1, "x.jpg", "<image>\na", "b", "", "c"), "empty_text"),
    "a text row with an empty question": (row(1, None, " ", "a"), "empty_text"),
    "a long text": (row(1, None, "ü" * 1001, "a"), "text_too_large"),
    "a long extra": ({**row(1, None, "a", "b"), "note": "x" * 2001}, "text_too_large"),
    "an absolute path": (row(1, "/etc/x.jpg", "<image>\na", "b"), "unsafe_path"),
    "a path that climbs": (row(1, "a/../../x.jpg", "<image>\na", "b"), "unsafe_path"),
    "a URL": (row(1, "http://host/x.jpg", "<image>\na", "b"), "unsafe_path"),
    "a NUL in the path": (row(1, "x\0.jpg", "<image>\na", "b"), "unsafe_path"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str) -> None:
    raw, reason = BAD[name]
    with pytest.raises(BadRow) as caught:
        parse(raw, "mix.json:0", TRAIN)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_paths_are_normalised() -> None:
    assert normal_path("a/./b//c.jpg") == normal_path("./a/b/c.jpg") == "a/b/c.jpg"


def test_sample_id_is_golden() -> None:
    """The rule is fixed: sha256 over [dataset, split, paths] as compact JSON; ids in old outputs must stay valid."""
    about_image = parse(row("a", "x/y.jpg", "<image>\nHi", "Ho"), "mix.json:0", TRAIN)
    other_words = parse(row("b", "x/./y.jpg", "Hm\n<image>", "Ha"), "mix.json:1", TRAIN)
    assert sample_id("mix", "train", about_image) == sample_id("mix", "train", other_words) == "de481eb2aa594d3635df72eb710f976a"
    text = parse(row("c", None, "Hi", "Ho"), "mix.json:2", TRAIN)
    assert sample_id("mix", "train", text) == "551598dea38b239f2fada5c17746acb3"
    assert sample_id("mix", "test", text) != sample_id("mix", "train", text)


def test_read_streams_every_row(tmp_path) -> None:
    path = tmp_path / "mix.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps([row(1, None, "a", "b"), 3, row("x", "p.jpg", "<image>\nc", "d")]).encode())
    rows = list(read(str(path), TRAIN, None))
    assert [type(item) for item in rows] == [SourceRow, Reject, SourceRow]
    assert [item.source for item in rows] == ["mix.json:0", "mix.json:1", "mix.json:2"]


@pytest.mark.parametrize("text", ['{\n "a": []}', "", '[{"a": 1}', '[{"a": 1}] x', '[{"a": NaN}]', "not json"])
def test_a_file_that_is_not_a_complete_list_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "mix.json"
    path.write_text(text)
    with pytest.raises(Refused, match=r"inputs.annotations: .*mix.json: "):
        list(read(str(path), TRAIN, None))


def test_json_lines(tmp_path) -> None:
    path = tmp_path / "mix.jsonl"
    lines = [json.dumps(row(1, None, "a", "b")), "", "{broken", json.dumps(row("x", "p.jpg", "<image>\nc", "d"))]
    path.write_text("\ufeff" + "\n".join(lines))
    rows = list(read(str(path), TRAIN, None))
    assert [type(item) for item in rows] == [SourceRow, Reject, SourceRow]
    assert (rows[1].reason, rows[1].detail.startswith("not JSON: ")) == ("bad_record", True)
    assert rows[2].paths == ("p.jpg",)
