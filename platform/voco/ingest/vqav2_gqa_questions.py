"""VQAv2's and GQA's own question files, read as rows of LLaVA's evaluation layout.

    {"data_subtype": "val2014", "questions": [{"question_id": 262148000, "image_id": 262148, "question": "Where is he?"}, ...]}
    {"201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "types": {...}, ...}, ...}

The answers to v2_OpenEnded_mscoco_val2014_questions.json are in v2_mscoco_val2014_annotations.json, `inputs.answers`; those to
GQA's testdev_balanced_questions.json are in its rows. LLaVA's files add the instruction only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
CATEGORY = "default"  # as in LLaVA's files of both sets

Record = dict[str, Any]


def open_questions(uri: str) -> tuple[Iterable[Any], Callable[[Any], Record]] | None:
    """The file's raw questions and the function that makes a row of one or raises BadRow; None for a file of another layout.

    Raises Refused for a VQAv2 file without the name of its image set and, while the questions are read, for one that ends early.
    """
    try:
        layout = json_records.detect_layout(uri, KEY)
    except Refused:  # a first line that is not JSON is one bad row of LLaVA's layout
        return None
    if layout == json_records.QUESTIONS:
        raws = (raw for _, raw in json_records.iterate_records(uri, KEY, layout))
        return raws, partial(vqav2_row, _image_set(uri))
    if layout == json_records.BY_ID:
        _, first = next(iter(json_records.iterate_records(uri, KEY, layout)))
        if isinstance(first, dict) and "imageId" in first:
            return json_records.iterate_records(uri, KEY, layout), gqa_row
    return None


def _image_set(uri: str) -> str:
    """The name of the image set in the file, such as val2014."""
    with storage.open_read(uri) as handle:
        try:
            for name in ijson.items(handle, "data_subtype"):
                if isinstance(name, str):
                    return name
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise Refused(f"{KEY}: {uri}: expected complete JSON: {message_line(error)}") from error
    raise Refused(f"{KEY}: {uri}: expected `data_subtype`, such as val2014, next to `questions`, got nothing")


def vqav2_row(image_set: str, raw: Any) -> Record:
    """A VQAv2 question; its image is COCO_<image_set>_<image_id in 12 digits>.jpg. Raises BadRow."""
    if not isinstance(raw, dict):
        raise BadRow("bad_record", f"expected an object, got {type(raw).__name__}")
    number = raw.get("image_id")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise BadRow("bad_record", f"image_id: expected a number, got {str(number)[:40]!r}")
    image = f"COCO_{image_set}_{number:012d}.jpg"
    return {"question_id": raw.get("question_id"), "image": image, "text": _text(raw), "category": CATEGORY}


def gqa_row(raw: tuple[str, Any]) -> Record:
    """A GQA question with its id; its image is <imageId>.jpg. Raises BadRow."""
    identity, record = raw
    if not isinstance(record, dict):
        raise BadRow("bad_record", f"expected an object, got {type(record).__name__}")
    if not isinstance(record.get("imageId"), str):
        raise BadRow("bad_record", f"imageId: expected a string, got {type(record.get('imageId')).__name__}")
    notes = {name: record[name] for name in NOTES if name in record}
    row = {"question_id": identity, "image": f"{record['imageId']}.jpg", "text": _text(record), "category": CATEGORY}
    return {**notes, **row, "answer": record.get("answer")}


def _text(record: Record) -> str:
    question = record.get("question")
    if not isinstance(question, str):
        raise BadRow("bad_record", f"question: expected a string, got {type(question).__name__}")
    return f"{question}\n{SHORT}" if question.strip() else ""
