"""Referring expressions, RefCOCO, RefCOCO+ and RefCOCOg: which box does the sentence mean?

The refer repository's files, a pickle of references and the boxes of COCO, `inputs.answers`:

    [{"ref_id": 0, "ann_id": 1719310, "image_id": 581857, "split": "testA", "file_name": "COCO_train2014_000000581857_16.jpg",
      "sentences": [{"sent_id": 0, "sent": "the lady with the blue shirt", ...}, ...], ...}, ...]        refs(unc).p
    {"images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 640, "height": 427}, ...],
     "annotations": [{"id": 1719310, "image_id": 581857, "bbox": [x, y, width, height], ...}, ...]}      instances.json

The pickle may have plain data only; nothing that it names is run. A row is a sentence. `split: train` and `val` read the
references of that split, `test` those of testA, testB and test; the reference's split is the category.

And conversions to JSON, a list or an object a line:

    {"id": "1", "image": "coco/train2017/000000581857.jpg", "conversations": [
      {"from": "human", "value": "<image>\\nPlease provide the bounding box coordinate of the region ... describes: a man."},
      {"from": "gpt", "value": "[0.28, 0.34, 0.4, 0.71]"}]}
    {"question_id": 1, "image": "000000581857.jpg", "text": "a man", "answer": "[0.28, 0.34, 0.4, 0.71]", "category": "testA"}
    {"image": "train2014/COCO_train2014_000000581857.jpg", "sent": "a man", "bbox": [x0, y0, x1, y1], "width": 640, "height": 427}

LLaVA's conversations, in val and test one row for each question whose answer is a box; LLaVA's evaluation layout; and lines as
Shikra and Qwen-VL have them (`img_path`, `expression`), whose `bbox` has corners in pixels. Boxes become LLaVA's: shares of the
side of the image padded to a square. An answer to learn has two decimals, as in LLaVA's data; a reference has four, because
rounding to hundredths moves the IoU of a small object across 0.5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ijson

from voco.errors import Refused, message_line
from voco.image.boxes import DECIMALS, Box, box_text, is_box, parse_box, square_box
from voco.ingest.answer_keys import KEY as ANSWERS
from voco.ingest.answer_keys import record_id
from voco.ingest.evaluation_row import EvaluationQuestion, make_evaluation_row
from voco.ingest.formats import Format, llava_json
from voco.ingest.parsing.json_rows import NotJson, as_object, iterate_rows
from voco.ingest.parsing.plain_pickle import is_pickle, read_plain_pickle
from voco.ingest.source_row import EVALUATION, BadRow, Reject, SourceRow, category_and_extra, parse_rows
from voco.job.config import Ingest
from voco.store import storage

KEY = "inputs.annotations"
QUESTION = "Please provide the bounding box coordinate of the region this sentence describes:"  # LLaVA's, in its mix
REFERENCE_DECIMALS = 4
SPLITS = {"train": ("train",), "val": ("val",), "test": ("test", "testA", "testB")}  # of a job to those of the references
SENTENCE = ("sent", "expression", "text", "question")  # keys of a JSON row, the first that it has
OWN_KEYS = {*SENTENCE, "id", "question_id", "image", "img_path", "answer", "answers", "label", "bbox", "conversations"}

Record = dict[str, Any]


@dataclass(frozen=True)
class CocoImage:
    """An image of COCO's instances: its file, and its size in pixels."""

    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class Instances:
    """The images by id, and image id and bbox (x, y, width, height in pixels) of the annotations by id."""

    images: dict[int, CocoImage]
    boxes: dict[int, tuple[int, Any]]


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every sentence of the split, in order. Raises Refused for a file in none of the layouts, a pickle with more than plain
    data, and a pickle without `inputs.answers`.
    """
    if not is_pickle(uri):
        if answers is not None:
            raise Refused(f"{ANSWERS}: expected none: the rows of {uri} have their boxes")
        return parse_rows(uri, json_questions(iterate_rows(uri), block), lambda raw, _, source: parse(raw, source, block))
    if answers is None:
        raise Refused(f"{ANSWERS}: expected the refer repository's instances.json with the boxes, got nothing")
    if block.split not in SPLITS:
        raise Refused(f"ingest.split: expected train, val or test (testA and testB are its categories), got {block.split}")
    references = read_plain_pickle(uri, KEY)
    if not isinstance(references, list) or not references:
        raise Refused(f"{KEY}: {uri}: expected a pickled list of references, got {type(references).__name__}")
    raws = list(_sentences(references, SPLITS[block.split]))
    if not raws:
        splits = sorted({str(raw.get("split")) for raw in references if isinstance(raw, dict)})
        raise Refused(f"ingest.split: expected a split of {uri}, which has {', '.join(splits)}, got {block.split}")
    annotations = {raw["ann_id"] for raw, _ in raws if isinstance(raw, dict) and isinstance(raw.get("ann_id"), int)}
    instances = read_instances(answers, annotations)
    return parse_rows(uri, raws, lambda raw, _, source: parse_sentence(raw[0], raw[1], source, block, instances))


def _sentences(references: list[Any], wanted: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    """(reference, sentence) of the split; a reference that is damaged comes once, with None."""
    for raw in references:
        if not isinstance(raw, dict) or raw.get("split") in wanted:
            sentences = raw.get("sentences") if isinstance(raw, dict) else None
            yield from ((raw, sentence) for sentence in (sentences if isinstance(sentences, list) and sentences else [None]))


def read_instances(uri: str, annotations: set[int]) -> Instances:
    """COCO's images, and these of its annotations. Raises Refused for a file without them."""
    images: dict[int, CocoImage] = {}
    boxes: dict[int, tuple[int, Any]] = {}
    for image in _records(uri, "images.item"):
        name, width, height = image.get("file_name"), image.get("width"), image.get("height")
        if isinstance(name, str) and isinstance(width, int) and isinstance(height, int) and width > 0 < height:
            images[image["id"]] = CocoImage(name.rsplit("/", 1)[-1], width, height)
    for annotation in _records(uri, "annotations.item"):
        number = annotation.get("image_id")
        if annotation["id"] in annotations and isinstance(number, int):
            boxes[annotation["id"]] = (number, annotation.get("bbox"))
    if not images or not boxes:
        raise Refused(f"{ANSWERS}: {uri}: expected COCO's `images` and `annotations`, with the references' ids")
    return Instances(images, boxes)


def _records(uri: str, prefix: str) -> Iterator[Record]:
    """Every object of a list with an integer `id`."""
    with storage.open_read(uri) as handle:
        try:
            for record in ijson.items(handle, prefix, use_float=True):
                if isinstance(record, dict) and isinstance(record.get("id"), int):
                    yield record
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise Refused(f"{ANSWERS}: {uri}: expected complete JSON: {message_line(error)}") from error


def parse_sentence(raw: Any, sentence: Any, source: str, block: Ingest, instances: Instances) -> SourceRow:
    """A sentence of a reference as a SourceRow. Raises BadRow for its first fault."""
    if not isinstance(raw, dict) or not isinstance(sentence, dict):
        raise BadRow("bad_record", "expected a reference with `sentences`")
    annotation, number = raw.get("ann_id"), raw.get("image_id")
    image = instances.images.get(number) if isinstance(number, int) else None
    if image is None:
        raise BadRow("bad_record", f"image_id: the instances have no image {str(number)[:40]}")
    of_image, bbox = instances.boxes.get(annotation, (None, None)) if isinstance(annotation, int) else (None, None)
    if of_image != number:
        raise BadRow("bad_record", f"ann_id: the instances have no annotation {str(annotation)[:40]} of image {number}")
    x, y, width, height = _numbers(bbox, "bbox")
    box = _square((x, y, x + width, y + height), image.width, image.height)
    text = sentence.get("sent", sentence.get("raw"))
    extra = {
        "ref_id": raw.get("ref_id"), "ann_id": annotation, "bbox": [x, y, width, height],
        "width": image.width, "height": image.height,
    }  # fmt: skip
    question = EvaluationQuestion(
        expression_prompt(text), [_spell(box, block)], record_id(sentence, "sent_id"), str(raw["split"]), extra=extra
    )
    return make_evaluation_row(source, block, question, "image", image.file_name)


def json_questions(rows: Iterable[Any], block: Ingest) -> Iterator[Any]:
    """The rows, and in val and test of a conversation a row for each question whose answer is a box: the question, then `answer`.

    A conversation without such a question stays, and is a reject.
    """
    for row in rows:
        turns = row.get("conversations") if isinstance(row, dict) and block.split in EVALUATION else None
        pairs = list(_box_pairs(turns)) if isinstance(turns, list) else []
        for index, (text, answer) in enumerate(pairs):
            others = {name: value for name, value in row.items() if name not in OWN_KEYS or name == "image"}
            identity = row.get("id", row.get("question_id", ""))
            yield {**others, "question_id": f"{identity}-{index}" if len(pairs) > 1 else identity, "text": text, "answer": answer}
        if not pairs:
            yield row


def _box_pairs(turns: list[Any]) -> Iterator[tuple[str, str]]:
    """(question, answer) of a conversation wherever the answer is a box and nothing else."""
    values = [(turn.get("from"), turn.get("value")) for turn in turns if isinstance(turn, dict)]
    for (asker, text), (_, answer) in itertools.pairwise(values):
        if asker in ("human", "user") and isinstance(text, str) and isinstance(answer, str) and is_box(answer):
            yield text.replace("<image>", "").strip(), answer.strip()


def parse(raw: Any, source: str, block: Ingest) -> SourceRow:
    """A JSON row as a SourceRow. Raises BadRow for its first fault."""
    if isinstance(raw, NotJson) or not isinstance(raw, dict):
        as_object(raw)
    if "conversations" in raw:
        if block.split in EVALUATION:
            raise BadRow("bad_record", "no question of the conversation has a box as its answer")
        return llava_json.parse(raw, source, block)
    image = raw.get("image", raw.get("img_path"))
    if not isinstance(image, str):
        raise BadRow("bad_record", f"image: expected a string, got {type(image).__name__}")
    text = next((raw[name] for name in SENTENCE if name in raw), None)
    category, extra = category_and_extra(raw, OWN_KEYS)
    box = _box_of(raw)
    source_id = record_id(raw, "question_id", "id") if {"question_id", "id"} & raw.keys() else source.rpartition(":")[2]
    if "bbox" in raw:
        extra["bbox"] = raw["bbox"]
    question = EvaluationQuestion(expression_prompt(text), [_spell(box, block)], source_id, category, extra=extra)
    return make_evaluation_row(source, block, question, "image", image)


def _box_of(raw: Record) -> Box:
    """LLaVA's box of a row: from `answer`, `answers` or `label`, a box as it is; from `bbox`, corners in pixels."""
    if "bbox" in raw:
        corners = _numbers(raw["bbox"], "bbox")
        width, height = raw.get("width"), raw.get("height")
        if not isinstance(width, int) or not isinstance(height, int) or min(width, height) < 1:
            raise BadRow("bad_record", "width, height: expected the image's size in pixels beside `bbox`")
        return _square(corners, width, height)
    value = next((raw[name] for name in ("answer", "answers", "label") if name in raw), None)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    box = _numbers(value, "answer") if isinstance(value, list) else parse_box(value) if isinstance(value, str) else None
    if box is None:
        raise BadRow("bad_record", "answer: expected a box, [x0, y0, x1, y1]")
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise BadRow("bad_record", f"answer: expected shares of the padded square from 0 to 1, corners in order, got {list(box)}")
    return box


def _numbers(value: Any, key: str) -> Box:
    numbers = value if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or not all(isinstance(item, int | float) and math.isfinite(item) for item in numbers):
        raise BadRow("bad_record", f"{key}: expected four numbers, got {str(value)[:60]}")
    first, second, third, fourth = (float(item) for item in numbers)
    return first, second, third, fourth


def _square(corners: Box, width: int, height: int) -> Box:
    """LLaVA's box of corners in pixels, which annotators may have drawn a pixel beyond the image."""
    x0, y0, x1, y1 = corners
    if not (-1 <= x0 < x1 <= width + 1 and -1 <= y0 < y1 <= height + 1):
        got = f"got {list(corners)} of {width} x {height}"
        raise BadRow("bad_record", f"bbox: expected corners in the image, the upper left one first, {got}")
    x0, x1 = (min(max(value, 0.0), float(width)) for value in (x0, x1))
    y0, y1 = (min(max(value, 0.0), float(height)) for value in (y0, y1))
    return square_box((x0, y0, x1, y1), width, height)


def _spell(box: Box, block: Ingest) -> str:
    return box_text(box, REFERENCE_DECIMALS if block.split in EVALUATION else DECIMALS)


def expression_prompt(text: Any) -> str:
    """An expression as LLaVA asks for its box; a text that asks already is unchanged. Raises BadRow for one without text."""
    if not isinstance(text, str):
        raise BadRow("bad_record", f"the expression: expected a string, got {type(text).__name__}")
    sentence = text.strip()
    if not sentence:
        raise BadRow("empty_text", "the expression has no text")
    if "bounding box" in sentence.lower():
        return sentence
    return f"{QUESTION} {sentence}" + ("" if sentence.endswith((".", "?", "!")) else ".")


FORMAT = Format(read, takes_answers=True)
