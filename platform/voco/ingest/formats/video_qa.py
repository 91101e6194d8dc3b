"""Questions about videos with short answers: MSVD-QA, MSRVTT-QA and ActivityNet-QA as LLaMA-VID and Video-LLaVA pack them.

    [{"id": 12, "video_id": "vid1301", "question": "what is a man slicing?", "answer": "bread"}, ...]      test_qa.json
    [{"question_id": "AbCdEfGhIjK_4", "video_name": "AbCdEfGhIjK", "question": "is it outdoors"}, ...]     test_q.json
    [{"question_id": "AbCdEfGhIjK_4", "answer": "yes", "type": 3}, ...]                    test_a.json, `inputs.answers`

The video's file is the id, or `v_` and the id, with one of the video extensions. The name of ActivityNet's `type` becomes the
category. Further keys go to `extra`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from voco.ingest.answer_keys import AnswerKey, AnswerKeys, record_answers, record_id
from voco.ingest.evaluation_row import EvaluationQuestion, make_evaluation_row
from voco.ingest.formats import Format
from voco.ingest.formats.video_chatgpt import video_stem
from voco.ingest.parsing import json_list
from voco.ingest.source_row import BadRow, Reject, SourceRow, category_and_extra, parse_rows
from voco.job.config import Ingest

OWN_KEYS = {"id", "question_id", "question", "answer", "video_id", "video_name"}

# Names of ActivityNet-QA's types, from its authors' list
TYPES = {
    0: "motion", 1: "spatial", 2: "temporal", 3: "yes/no", 4: "color", 5: "object", 6: "location", 7: "number", 8: "other",
}  # fmt: skip


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row of the file, in order. Raises Refused when it is not one JSON list, or the answers' file cannot be used."""
    references = AnswerKeys(answers) if answers is not None else None
    return parse_rows(uri, json_list.iterate_list(uri), lambda raw, _, source: parse(raw, source, block, references))


def parse(raw: Any, source: str, block: Ingest, references: AnswerKeys | None) -> SourceRow:
    """One row as a SourceRow. Raises BadRow for its first fault."""
    if not isinstance(raw, dict):
        raise BadRow("bad_record", f"expected an object, got {type(raw).__name__}")
    if not isinstance(raw.get("question"), str):
        raise BadRow("bad_record", f"question: expected a string, got {type(raw.get('question')).__name__}")
    video = video_stem(record_id(raw, "video_id", "video_name"))
    source_id = record_id(raw, "question_id", "id")
    reference = references.lookup(raw) if references is not None else AnswerKey(record_answers(raw))
    category, extra = category_and_extra(raw, OWN_KEYS)
    extra |= json.loads(reference.notes)
    if not category and "type" in extra:
        number = extra["type"]
        category = TYPES.get(number, str(number)) if isinstance(number, int) else str(number)
    question = EvaluationQuestion(raw["question"], reference.answers, source_id, category, extra=extra)
    return make_evaluation_row(source, block, question, "video", video)


FORMAT = Format(read, takes_answers=True, missing_share=1.0)
