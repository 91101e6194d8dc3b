"""LLaVA's evaluation layout: a line is a question about an image; the answers are in a second file, `inputs.answers`.

    {"question_id": 17, "image": "COCO_val2014_000000111111.jpg", "text": "Is there a dog in the image?\\nAnswer the
     question using a single word or phrase.", "category": "popular"}

GQA, VQAv2, TextVQA, POPE and MME have this layout; `answer_keys.py` joins each with its answers. `question` may stand for `text`,
and the rows may be one list instead of lines. Further keys go to `extra`, with the notes of the answers' file. Files as VQAv2,
GQA, MM-Vet and VizWiz publish them are read too (`ingest/published_questions.py`). POPE's own files need no second file: each row
has its `label`, the file's name has the category, and the question gets LLaVA's instruction.

In the splits val and test a file in which no row has an answer, of a job without `inputs.answers`, is a set whose answers are not
published (VQAv2 test-dev, VizWiz test, MM-Vet, LLaVA-Bench): its rows have no references.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from voco.errors import message_line
from voco.ingest.answer_keys import AnswerKey, AnswerKeys, pope_object, record_answers, record_id
from voco.ingest.evaluation_row import SHORT, EvaluationQuestion, make_evaluation_row
from voco.ingest.formats import Format
from voco.ingest.parsing import json_records
from voco.ingest.published_questions import QuestionFile, open_questions
from voco.ingest.source_row import EVALUATION, BadRow, Reject, SourceRow, category_and_extra, parse_rows
from voco.job.config import Ingest

OWN_KEYS = {"question_id", "image", "text", "answer", "answers", "label"}
POPE_FILE = re.compile(r"\w+_pope_(?P<category>[a-z]+)\.jsonl?")  # coco_pope_adversarial.json; also of GQA's and A-OKVQA's images


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every question, in order. Raises Refused when the answers' file cannot be used, or a set's own file is incomplete."""
    references = AnswerKeys(answers) if answers is not None else None
    pope = POPE_FILE.fullmatch(uri.rsplit("/", 1)[-1])
    category = pope["category"] if pope else ""
    questions = open_questions(uri) or QuestionFile(partial(json_records.iterate_lines, uri), line_row)
    unanswered = references is None and block.split in EVALUATION and not _has_answers(questions)

    def parse_question(raw: Any, _: int, source: str) -> SourceRow:
        return parse(questions.row_of(raw), source, block, references, category, unanswered)

    return parse_rows(uri, questions.raws(), parse_question)


def _has_answers(questions: QuestionFile) -> bool:
    """True when a row has an answer. Reads up to the first one."""
    for raw in questions.raws():
        try:
            if record_answers(questions.row_of(raw)):
                return True
        except BadRow:
            continue
    return False


def parse(
    row: dict[str, Any], source: str, block: Ingest, references: AnswerKeys | None, category: str, unanswered: bool
) -> SourceRow:
    """One question as a SourceRow; `category` is for rows without one. Raises BadRow for its first fault."""
    if "text" not in row and "question" in row:
        row = {"text": row["question"], **{key: value for key, value in row.items() if key != "question"}}
    for key in ("image", "text"):
        if not isinstance(row.get(key), str):
            raise BadRow("bad_record", f"{key}: expected a string, got {type(row.get(key)).__name__}")
    source_id = record_id(row, "question_id")
    reference = references.lookup(row) if references is not None else AnswerKey(record_answers(row))
    row_category, extra = category_and_extra(row, OWN_KEYS)
    extra |= json.loads(reference.notes)
    question = EvaluationQuestion(
        _prompt(row), reference.answers, source_id, row_category or category, extra=extra, of_unanswered_set=unanswered
    )
    return make_evaluation_row(source, block, question, "image", row["image"])


def _prompt(row: dict[str, Any]) -> str:
    """The question as it is asked: that of POPE's own rows, which have a label, with the instruction of LLaVA's rows."""
    text: str = row["text"]
    if "label" not in row or text.rstrip().endswith(SHORT) or pope_object(row) is None:
        return text
    return f"{text}\n{SHORT}"


def line_row(raw: bytes) -> dict[str, Any]:
    """A line of LLaVA's layout. Raises BadRow."""
    try:
        row = json_records.parse_line(raw)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_record", f"not JSON: {message_line(error, 120)}") from error
    if not isinstance(row, dict):
        raise BadRow("bad_record", f"expected an object, got {type(row).__name__}")
    return row


FORMAT = Format(read, takes_answers=True)
