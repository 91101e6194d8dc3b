"""RefCOCO: the refer repository's pickle without running it, COCO's boxes, and conversions to JSON."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingest import source

import pipelines
from pipelines import cli
from voco.errors import Refused
from voco.image.boxes import parse_box
from voco.ingest.formats.refcoco import QUESTION, read
from voco.ingest.parsing.plain_pickle import read_plain_pickle
from voco.ingest.source_row import Reject, SourceRow
from voco.job.config import Ingest
from voco.job.load import build_job

VAL, TEST, TRAIN = (Ingest(format="refcoco", dataset="refcoco", split=split) for split in ("val", "test", "train"))


def reference(number: int, split: str, *sentences: str, **keys: Any) -> dict[str, Any]:
    """As refs(unc).p has it: reference `number` is annotation 100 + number of image 10 + number."""
    spoken = [
        {"tokens": text.split(), "raw": text.upper(), "sent_id": 10 * number + index, "sent": text}
        for index, text in enumerate(sentences)
    ]
    about = {"ref_id": number, "ann_id": 100 + number, "category_id": 1, "image_id": 10 + number, "split": split}
    file = {"file_name": f"COCO_train2014_{10 + number:012d}_{number}.jpg", "sent_ids": [item["sent_id"] for item in spoken]}
    return {**about, **file, "sentences": spoken, **keys}


def instances(count: int = 10, **changes: Any) -> dict[str, Any]:
    images = [
        {"id": 10 + number, "file_name": f"COCO_train2014_{10 + number:012d}.jpg", "width": 640, "height": 480, "license": 1}
        for number in range(count)
    ]
    annotations = [
        {"id": 100 + number, "image_id": 10 + number, "bbox": [320.0, 60.5, 160, 120.25], "segmentation": [[1.5, 2]], "area": 3}
        for number in range(count)
    ]
    return {"info": {"year": 2014}, "images": images, "annotations": annotations, "categories": [], **changes}


def write(folder: Path, references: Any, boxes: dict[str, Any] | None = None, protocol: int = 2) -> tuple[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(references, protocol))
    (folder / "instances.json").write_text(json.dumps(instances() if boxes is None else boxes))
    return str(folder / "refs(unc).p"), str(folder / "instances.json")


def rows(items: Any) -> list[SourceRow]:
    return [item for item in items if isinstance(item, SourceRow)]


REFERENCES = [
    reference(0, "train", "a man"),
    reference(1, "val", "the lady with the blue shirt", "woman on the left?"),
    reference(2, "testA", "boy"),
    reference(3, "testB", "zebra", "the big one"),
    reference(4, "test", "a cup of tea."),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_sentence_is_a_question_with_the_box_of_its_annotation(tmp_path: Path, protocol: int) -> None:
    uri, boxes = write(tmp_path, REFERENCES, protocol=protocol)
    first, second = rows(read(uri, VAL, boxes))
    assert first.paths == ("COCO_train2014_000000000011.jpg",)
    # x 320 and 480 of 640; y 60.5 + 80 and 180.75 + 80 of 640: padding of 80 pixels above and below
    assert first.conversation == {
        "source_id": "10", "turns": [{"role": "user", "text": f"{QUESTION} the lady with the blue shirt."}],
        "placeholder": "before", "answers": ["[0.5, 0.2195, 0.75, 0.4074]"], "choices": [], "category": "val",
        "extra": '{"ann_id":101,"bbox":[320.0,60.5,160.0,120.25],"height":480,"ref_id":1,"width":640}',
    }  # fmt: skip
    assert second.conversation["turns"][0]["text"] == f"{QUESTION} woman on the left?"
    tests = rows(read(uri, TEST, boxes))
    assert [row.conversation["category"] for row in tests] == ["testA", "testB", "testB", "test"]
    assert tests[-1].conversation["turns"][0]["text"] == f"{QUESTION} a cup of tea."


def test_training_rows_have_hundredths_as_llavas_data(tmp_path: Path) -> None:
    uri, boxes = write(tmp_path, REFERENCES)
    (row,) = rows(read(uri, TRAIN, boxes))
    turns = [(turn["role"], turn["text"]) for turn in row.conversation["turns"]]
    assert turns == [("user", f"{QUESTION} a man."), ("assistant", "[0.5, 0.22, 0.75, 0.41]")]


PYTHON_2 = b"""(lp1
(dp2
S'sentences'
p3
(lp4
(dp5
S'sent'
p6
Vcaf\\u00e9 table
p7
sS'sent_id'
p8
L7L
sS'raw'
p9
S'caf\\xe9'
p10
sasS'ann_id'
p11
I101
sS'split'
p12
S'val'
p13
sS'image_id'
p14
I11
sS'ref_id'
p15
I1
sa."""


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Byte strings, unicode strings, long integers; Latin-1 in `raw`, which is not read, is no error."""
    _, boxes = write(tmp_path, [])
    (tmp_path / "refs(google).p").write_bytes(PYTHON_2)
    (row,) = rows(read(str(tmp_path / "refs(google).p"), VAL, boxes))
    assert row.conversation["turns"][0]["text"] == f"{QUESTION} café table."
    assert row.conversation["source_id"] == "7"


class Attack:
    """Unpickled by `pickle.load`, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    uri, boxes = write(tmp_path, [*REFERENCES, Attack(tmp_path / "gone")], protocol=protocol)
    with pytest.raises(
        Refused, match=r"inputs.annotations: .*refs\(unc\).p: expected a pickle of plain data, .*mkdir; it was not"
    ):
        list(read(uri, VAL, boxes))
    assert not (tmp_path / "gone").exists()
    pickle.loads((tmp_path / "refs(unc).p").read_bytes())
    assert (tmp_path / "gone").exists()  # so the attack is a real one


@pytest.mark.parametrize(
    "value", [np.int64(3), OrderedDict(a=1), {1}, Path("a"), len, complex(1, 2)], ids=lambda value: type(value).__name__
)
def test_anything_but_plain_data_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a.p").write_bytes(pickle.dumps([value], 2))
    with pytest.raises(Refused, match=r"key: .*a\.p: expected a pickle of plain data, got one that names [\w.]+; it was not run"):
        read_plain_pickle(str(tmp_path / "a.p"), "key")


@pytest.mark.parametrize("value", [[1, 2.5, "a", b"a", None, True, (1, [2]), {"a": {"b": 10**40}}], []])
def test_plain_data_is_read(tmp_path: Path, value: Any) -> None:
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):  # before, bytes are pickled as a call
        (tmp_path / "a.p").write_bytes(pickle.dumps(value, protocol))
        assert read_plain_pickle(str(tmp_path / "a.p"), "key") == value


HOSTILE = {
    "cut": pickle.dumps([1, 2, 3], 2)[:-3],
    "empty after the protocol": b"\x80\x02",
    "a table of 2^32 entries": b"\x80\x02]r\xff\xff\xff\xffe.",
    "a string of 2^62 bytes": b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"a.",
    "a call of a string": b"(S'a'\nS'b'\nR.",
    "the state of a list": b"\x80\x02](X\x01\x00\x00\x00aK\x01db.",
    "an append to a string": b"(S'a'\nI1\na.",
    "a memo that is not there": b"(g7\n.",
    "a persistent id": b"(P7\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "no opcode": b"(\xff.",
    "an unknown protocol": b"\x80\x63].",
    "a number that is none": b"(Ix\n.",
    "an instance": b"(cos\nsystem\n(S'true'\ntR.",
    "an instance, the old way": b"(S'true'\nios\nsystem\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused(tmp_path: Path, name: str) -> None:
    uri, boxes = write(tmp_path, [])
    Path(uri).write_bytes(HOSTILE[name])
    with pytest.raises(Refused, match=r"inputs.annotations: .*expected a (complete pickle|pickle of plain data)"):
        list(read(uri, VAL, boxes))


@pytest.mark.parametrize(
    ("damaged", "reason", "detail"),
    [
        ("text", "bad_record", "expected a reference with `sentences`"),
        (reference(1, "val"), "bad_record", "expected a reference with `sentences`"),
        (reference(1, "val", "a", sentences="no"), "bad_record", "expected a reference with `sentences`"),
        (reference(1, "val", "a", image_id=999), "bad_record", "image_id: the instances have no image 999"),
        (reference(1, "val", "a", image_id=[1]), "bad_record", "image_id"),
        (reference(1, "val", "a", ann_id=102), "bad_record", "ann_id: the instances have no annotation 102 of image 11"),
        (reference(1, "val", "a", ann_id={}), "bad_record", "ann_id"),
        (reference(1, "val", " "), "empty_text", "no text"),
        (reference(1, "val", "a", sentences=[{"sent": 3, "sent_id": 1}]), "bad_record", "the expression: expected a string"),
        (reference(1, "val", "a", sentences=[{"sent": "a"}]), "bad_record", "sent_id: expected"),
    ],
)  # fmt: skip
def test_a_damaged_reference_is_a_reject(tmp_path: Path, damaged: Any, reason: str, detail: str) -> None:
    uri, boxes = write(tmp_path, [damaged, reference(2, "val", "b")])
    bad, good = list(read(uri, VAL, boxes))
    assert isinstance(bad, Reject)
    assert (bad.reason, bad.source) == (reason, "refs(unc).p:0")
    assert detail in bad.detail
    assert isinstance(good, SourceRow)


@pytest.mark.parametrize(
    "bbox",
    [None, [1, 2, 3], [1, 2, "a", 4], [1, 2, 0, 4], [1, 2, -3, 4], [600, 2, 100, 4], [1, 470, 5, 40], [float("nan"), 2, 3, 4]],
)
def test_a_damaged_box_is_a_reject(tmp_path: Path, bbox: Any) -> None:
    annotations = [{"id": 101, "image_id": 11, "bbox": bbox}, {"id": 102, "image_id": 12, "bbox": [0, 0, 640.5, 480.5]}]
    boxes = json.dumps(instances(annotations=annotations)).replace("NaN", '"NaN"')
    uri, path = write(tmp_path, [reference(1, "val", "a"), reference(2, "val", "b")])
    Path(path).write_text(boxes)
    bad, good = list(read(uri, VAL, path))
    assert isinstance(bad, Reject)
    assert bad.detail.startswith("bbox: expected")
    assert isinstance(good, SourceRow)
    assert good.conversation["answers"] == ["[0.0, 0.125, 1.0, 0.875]"]  # half a pixel beyond the image is clipped


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    uri, boxes = write(tmp_path, REFERENCES)
    with pytest.raises(Refused, match=r"inputs.answers: expected the refer repository's instances.json"):
        list(read(uri, VAL, None))
    with pytest.raises(Refused, match=r"ingest.split: expected train, val or test .*got testA"):
        list(read(uri, Ingest(format="refcoco", dataset="r", split="testA"), boxes))
    without, _ = write(tmp_path / "other", [reference(1, "train", "a")])
    with pytest.raises(Refused, match=r"ingest.split: expected a split of .*refs\(unc\).p, which has train, got val"):
        list(read(without, VAL, boxes))
    for content in ('{"images": []}', "[]", "{", '{"images": [], "annotations": [{"id": 101}]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(Refused, match=r"inputs.answers: .*bad.json: expected"):
            list(read(uri, VAL, str(tmp_path / "bad.json")))
    (tmp_path / "dict.p").write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(Refused, match="expected a pickled list of references, got dict"):
        list(read(str(tmp_path / "dict.p"), VAL, boxes))


def conversation(*texts: str, **keys: Any) -> dict[str, Any]:
    return {**source.row("c", "coco/1.jpg", *texts), **keys}


ASK = f"{QUESTION} a man."
BOX = "[0.28, 0.34, 0.4, 0.71]"


def read_json(folder: Path, listed: list[Any], block: Ingest, lines: bool = False) -> list[SourceRow | Reject]:
    file = folder / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in listed) if lines else json.dumps(listed))
    return list(read(str(file), block, None))


@pytest.mark.parametrize("lines", [False, True])
def test_conversations_give_a_question_for_each_box(tmp_path: Path, lines: bool) -> None:
    description = "Please provide a short description for this region: [0.1, 0.1, 0.2, 0.2]."
    long = conversation(f"<image>\n{ASK}", BOX, description, "Red jacket.", f"{QUESTION} the boy.", "[0.0, 0.12, 1.0, 0.88].")
    listed = [long, conversation(ASK + "\n<image>", BOX, category="val"), conversation(f"<image>\n{description}", "Red.")]
    first, second, third, bad = read_json(tmp_path, listed, VAL, lines)
    assert isinstance(bad, Reject)
    assert "no question of the conversation has a box" in bad.detail
    questions = rows([first, second, third])
    assert [row.conversation["answers"] for row in questions] == [[BOX], ["[0.0, 0.12, 1.0, 0.88]"], [BOX]]
    assert [row.conversation["source_id"] for row in questions] == ["c-0", "c-1", "c"]
    assert {row.paths for row in questions} == {("coco/1.jpg",)}
    assert [row.conversation["turns"][0]["text"] for row in questions] == [ASK, f"{QUESTION} the boy.", ASK]
    assert questions[2].conversation["category"] == "val"
    (training,) = read_json(tmp_path, [long], TRAIN, lines)
    assert isinstance(training, SourceRow)
    assert len(training.conversation["turns"]) == 6  # as llava_json reads it


LINES: list[tuple[dict[str, Any], str, str]] = [
    ({"question_id": 1, "image": "a.jpg", "text": "a man", "answer": BOX}, ASK, BOX),
    ({"question_id": 1, "image": "a.jpg", "text": ASK, "answer": [0.28, 0.34, 0.4, 0.71]}, ASK, BOX),
    ({"question_id": 1, "image": "a.jpg", "question": "a man.", "answers": [BOX]}, ASK, BOX),
    ({"id": "7", "image": "a.jpg", "text": "a man", "label": BOX}, ASK, BOX),
    ({"image": "a.jpg", "sent": "a man", "bbox": [320, 60.5, 480, 180.75], "width": 640, "height": 480},
     ASK, "[0.5, 0.2195, 0.75, 0.4074]"),
    ({"img_path": "a.jpg", "expression": "a man", "bbox": [0, 0, 640, 480], "width": 640, "height": 480, "dataset_name": "x"},
     ASK, "[0.0, 0.125, 1.0, 0.875]"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "text", "box"), LINES)
def test_lines_of_llava_shikra_and_qwen(tmp_path: Path, line: dict[str, Any], text: str, box: str) -> None:
    (row,) = read_json(tmp_path, [line], VAL, lines=True)
    assert isinstance(row, SourceRow), row
    assert row.paths == ("a.jpg",)
    assert row.conversation["turns"] == [{"role": "user", "text": text}]
    assert row.conversation["answers"] == [box]
    assert parse_box(box) is not None


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("text", "expected an object"),
        ({"text": "a", "answer": BOX}, "image: expected a string"),
        ({"image": "a", "answer": BOX}, "the expression: expected a string"),
        ({"image": "a", "text": "a"}, "answer: expected a box"),
        ({"image": "a", "text": "a", "answer": "left"}, "answer: expected a box"),
        ({"image": "a", "text": "a", "answer": "[10, 20, 30, 40]"}, "answer: expected shares of the padded square"),
        ({"image": "a", "text": "a", "answer": "[0.4, 0.2, 0.1, 0.9]"}, "corners in order"),
        ({"image": "a", "text": "a", "bbox": [1, 2, 3, 4]}, "width, height: expected"),
        ({"image": "a", "text": "a", "bbox": [100, 200, 30, 40], "width": 640, "height": 480}, "bbox: expected corners"),
        ({"image": "a", "text": "a", "bbox": [1, 2, 3], "width": 640, "height": 480}, "bbox: expected four numbers"),
    ],
)
def test_a_line_without_a_box_is_a_reject(tmp_path: Path, line: Any, detail: str) -> None:
    (bad,) = read_json(tmp_path, [line], VAL)
    assert isinstance(bad, Reject)
    assert detail in bad.detail


def test_json_with_answers_elsewhere_is_refused(tmp_path: Path) -> None:
    _, boxes = write(tmp_path, REFERENCES)
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(Refused, match=r"inputs.answers: expected none"):
        list(read(str(tmp_path / "rows.json"), VAL, boxes))


def test_the_stage_writes_what_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with a picture that is missing: read = written + rejected, and an image's expressions are one sample."""
    uri, boxes = write(tmp_path, [*REFERENCES, reference(3, "testB", "another zebra", ref_id=9)])
    for number in (12, 13):
        path = tmp_path / "media" / f"COCO_train2014_{number:012d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.image(number, size=(64, 48)))
    raw = {
        "name": "refcoco", "kind": "ingest", "output": str(tmp_path / "out"),
        "inputs": {"annotations": uri, "answers": boxes, "media": str(tmp_path / "media")},
        "ingest": {"format": "refcoco", "dataset": "refcoco", "split": "test", "max_missing_share": 1.0},
    }  # fmt: skip
    counts = pipelines.run(build_job("test.yaml", raw)).counts
    assert (counts["read"], counts["written"], counts["rejected"]) == (5, 4, {"missing_media": 1})
    samples = source.table(tmp_path / "out", "samples")
    assert sorted(len(sample["conversations"]) for sample in samples) == [1, 3]
    (tmp_path / "job.yaml").write_text(json.dumps({**raw, "output": str(tmp_path / "new")}))
    assert cli.main(["plan", str(tmp_path / "job.yaml")]) == 0, capsys.readouterr().err
