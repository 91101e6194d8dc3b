"""Question files as their authors publish them, read as rows of LLaVA's evaluation layout and recognised by their content.

    {"data_subtype": "val2014", "questions": [{"question_id": 262148000, "image_id": 262148, "question": "Where is he?"}, ...]}
    {"201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "types": {...}, ...}, ...}
    {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "x=-1<AND>x=-5", "capability": [...], ...}, ...}
    [{"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}, ...]
    [{"question_id": 17, "image": "17.jpg", "text": "Is it wet?"}, ...]

VQAv2: the answers to v2_OpenEnded_mscoco_val2014_questions.json are in v2_mscoco_val2014_annotations.json, `inputs.answers`;
those to the test questions are not published. GQA: testdev_balanced_questions.json has its answers. MM-Vet: its answers are for
a judge, no string equals them, so they go to `extra` as `reference`. VizWiz: val.json has ten answers a row, test.json none.
The last form is LLaVA's layout as one list. LLaVA's files add an instruction to VQAv2's, GQA's and VizWiz's questions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ijson

from voco.errors import Refused, message_line
from voco.ingest.answer_keys import NOTES
from voco.ingest.evaluation_row import SHORT
from voco.ingest.parsing import json_records
from voco.ingest.source_row import BadRow
from voco.store import storage

KEY = "inputs.annotations"
CATEGORY = "default"  # as in LLaVA's files of these sets
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."  # LLaVA's, for VizWiz
VIZWIZ_IMAGE = re.compile(r"VizWiz_[a-z]+_(\d+)\.\w+")  # LLaVA's question id is the number

Record = dict[str, Any]


@dataclass(frozen=True)
class QuestionFile:
    """A file's raw questions, from the first one at each call, and the function that makes a row of one or raises BadRow."""

    raws: Callable[[], Iterable[Any]]
    row_of: Callable[[Any], Record]


def open_questions(uri: str) -> QuestionFile | None:
    """The questions of a file in one of these layouts; None for a file of another layout.

    Raises Refused for a VQAv2 file without the name of its image set and, while the questions are read, for one that ends early.
    """
    try:
        layout = json_records.detect_layout(uri, KEY)
    except Refused:  # a first line that is not JSON is one bad row of LLaVA's layout
        return None
    values = partial(_values, uri, layout)
    if layout == json_records.QUESTIONS:
        return QuestionFile(values, partial(vqav2_row, _image_set(uri)))
    if layout == json_records.ITSELF:
        return QuestionFile(values, list_row)
    if layout == json_records.BY_ID:
        _, first = next(iter(json_records.iterate_records(uri, KEY, layout)))
        rows = {"imageId": gqa_row, "imagename": mmvet_row}
        for name in rows if isinstance(first, dict) else ():
            if name in first:
                return QuestionFile(partial(json_records.iterate_records, uri, KEY, layout), rows[name])
    return None


def _values(uri: str, layout: str) -> Iterator[Any]:
    return (raw for _, raw in json_records.iterate_records(uri, KEY, layout))


def _image_set(uri: str) -> str:
    """The name of the image set in the file, such as val2014. The questions of test-dev2015 are about images of test2015."""
    with storage.open_read(uri) as handle:
        try:
            for name in ijson.items(handle, "data_subtype"):
                if isinstance(name, str):
                    return re.sub("^test-[a-z]+", "test", name)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise Refused(f"{KEY}: {uri}: expected complete JSON: {message_line(error)}") from error
    raise Refused(f"{KEY}: {uri}: expected `data_subtype`, such as val2014, next to `questions`, got nothing")


def _object(raw: Any) -> Record:
    if not isinstance(raw, dict):
        raise BadRow("bad_record", f"expected an object, got {type(raw).__name__}")
    return raw


def list_row(raw: Any) -> Record:
    """A question of a list: LLaVA's row as it is, or VizWiz's, which has no id. Raises BadRow."""
    record = _object(raw)
    image = record.get("image")
    number = VIZWIZ_IMAGE.fullmatch(image) if isinstance(image, str) and "question_id" not in record else None
    if number is None:
        return record
    others = {name: value for name, value in record.items() if name != "question"}
    text = _text(record, f"{UNANSWERABLE}\n{SHORT}")
    return {**others, "question_id": int(number[1]), "text": text, "category": CATEGORY}


def vqav2_row(image_set: str, raw: Any) -> Record:
    """A VQAv2 question; its image is COCO_<image_set>_<image_id in 12 digits>.jpg. Raises BadRow."""
    record = _object(raw)
    number = record.get("image_id")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise BadRow("bad_record", f"image_id: expected a number, got {str(number)[:40]!r}")
    image = f"COCO_{image_set}_{number:012d}.jpg"
    return {"question_id": record.get("question_id"), "image": image, "text": _text(record, SHORT), "category": CATEGORY}


def gqa_row(raw: tuple[str, Any]) -> Record:
    """A GQA question with its id; its image is <imageId>.jpg. Raises BadRow."""
    identity, record = raw[0], _object(raw[1])
    if not isinstance(record.get("imageId"), str):
        raise BadRow("bad_record", f"imageId: expected a string, got {type(record.get('imageId')).__name__}")
    notes = {name: record[name] for name in NOTES if name in record}
    row = {"question_id": identity, "image": f"{record['imageId']}.jpg", "text": _text(record, SHORT), "category": CATEGORY}
    return {**notes, **row, "answer": record.get("answer")}


def mmvet_row(raw: tuple[str, Any]) -> Record:
    """An MM-Vet question with its id, asked as it is; what its judge needs goes to `extra`. Raises BadRow."""
    identity, record = raw[0], _object(raw[1])
    judged: Record = {name: record[name] for name in ("imagesource", "capability") if name in record}
    row = {"question_id": identity, "image": record.get("imagename"), "text": _text(record), "category": CATEGORY}
    return {**judged, **row, "reference": record.get("answer")}


def _text(record: Record, instruction: str = "") -> str:
    question = record.get("question")
    if not isinstance(question, str):
        raise BadRow("bad_record", f"question: expected a string, got {type(question).__name__}")
    return f"{question}\n{instruction}" if question.strip() and instruction else question
