"""LLaVA's evaluation layout: a line is a question about an image; the answers are in a second file, `inputs.answers`.

    {"question_id": 17, "image": "COCO_val2014_000000111111.jpg", "text": "Is there a dog in the image?\\nAnswer the
     question using a single word or phrase.", "category": "popular"}

GQA, VQAv2, TextVQA, POPE and MME have this layout; `answer_keys.py` joins each with its answers. POPE's own files need no
second file: each row has its `label`, and the file's name has the category. Further keys go to `extra`, with the notes of the
answers' file. VQAv2's and GQA's own files, recognised by their content, are read too (`ingest/vqav2_gqa_questions.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from voco.errors import message_line
from voco.ingest import vqav2_gqa_questions
from voco.ingest.answer_keys import AnswerKey, AnswerKeys, record_answers, record_id
from voco.ingest.evaluation_row import EvaluationQuestion, make_evaluation_row
from voco.ingest.formats import Format
from voco.ingest.parsing import json_records
from voco.ingest.source_row import BadRow, Reject, SourceRow, category_and_extra, parse_rows
from voco.job.config import Ingest

OWN_KEYS = {"question_id", "image", "text", "answer", "answers", "label"}
POPE = "coco_pope_"  # its files: coco_pope_adversarial.json


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every question, in order. Raises Refused when the answers' file cannot be used, or a set's own file is incomplete."""
    references = AnswerKeys(answers) if answers is not None else None
    name = uri.rsplit("/", 1)[-1]
    category = name.removeprefix(POPE).split(".")[0] if name.startswith(POPE) else ""
    raws, row_of = vqav2_gqa_questions.open_questions(uri) or (json_records.iterate_lines(uri), line_row)
    return parse_rows(uri, raws, lambda raw, _, source: parse(raw, row_of, source, block, references, category))


def parse(
    raw: Any, row_of: Callable[[Any], dict[str, Any]], source: str, block: Ingest, references: AnswerKeys | None, category: str
) -> SourceRow:
    """One question as a SourceRow; `category` is for rows without one. Raises BadRow for its first fault."""
    row = row_of(raw)
    for key in ("image", "text"):
        if not isinstance(row.get(key), str):
            raise BadRow("bad_record", f"{key}: expected a string, got {type(row.get(key)).__name__}")
    source_id = record_id(row, "question_id")
    reference = references.lookup(row) if references is not None else AnswerKey(record_answers(row))
    row_category, extra = category_and_extra(row, OWN_KEYS)
    extra |= json.loads(reference.notes)
    question = EvaluationQuestion(row["text"], reference.answers, source_id, row_category or category, extra=extra)
    return make_evaluation_row(source, block, question, "image", row["image"])


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is a number in Python, not in JSON")


def line_row(raw: bytes) -> dict[str, Any]:
    """A line of LLaVA's layout. Raises BadRow."""
    try:
        row = json.loads(raw, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_record", f"not JSON: {message_line(error, 120)}") from error
    if not isinstance(row, dict):
        raise BadRow("bad_record", f"expected an object, got {type(row).__name__}")
    return row


FORMAT = Format(read, takes_answers=True)
