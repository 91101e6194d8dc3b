"""SEED-Bench.json: multiple choice questions about images and about videos.

    {"question_type": {"Scene Understanding": 1, ...},
     "questions": [{"question_id": "101669", "question": "...", "choice_a": "...", ..., "choice_d": "...", "answer": "A",
                    "data_type": "image", "data_id": "1454426_2591111986", "question_type_id": 1}, ...]}

Media have LLaVA's paths: `SEED-Bench-image/<data_id>` for an image, and for a video its middle frame, extracted beforehand, at
`SEED-Bench-video-image/<question_type_id>_<question_id>.png`. Without these frames, the questions about videos, a quarter of the
set, are rejected as missing_media; `max_missing_share` allows it. The type's name is the category.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ijson

from voco.errors import Refused, message_line
from voco.ingest.answer_keys import record_id
from voco.ingest.evaluation_row import LETTERS, EvaluationQuestion, make_evaluation_row, with_options
from voco.ingest.formats import Format
from voco.ingest.parsing import json_records
from voco.ingest.source_row import BadRow, Reject, SourceRow, parse_rows
from voco.job.config import Ingest
from voco.store import storage

KEY = "inputs.annotations"
NOTES = ("data_type", "data_id", "question_type_id", "segment")  # go to `extra`


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every question, in order. Raises Refused when the file is not one complete JSON object with `questions`."""
    if json_records.detect_layout(uri, KEY) != json_records.QUESTIONS:
        raise Refused(f"{KEY}: {uri}: expected an object with a list of `questions`")
    types = _types(uri)
    raws = (raw for _, raw in json_records.iterate_records(uri, KEY, json_records.QUESTIONS))
    return parse_rows(uri, raws, lambda raw, _, source: parse(raw, source, block, types))


def parse(raw: Any, source: str, block: Ingest, types: dict[str, str]) -> SourceRow:
    """One question as a SourceRow; `types` names its type. Raises BadRow for its first fault."""
    if not isinstance(raw, dict):
        raise BadRow("bad_record", f"expected an object, got {type(raw).__name__}")
    source_id, media, kind = record_id(raw, "question_id"), record_id(raw, "data_id"), record_id(raw, "question_type_id")
    options = [raw.get(f"choice_{letter.lower()}") for letter in LETTERS[:4]]
    choices = [choice for choice in options if isinstance(choice, str)]
    if not isinstance(raw.get("question"), str) or len(choices) < len(options):
        raise BadRow("bad_record", "question, choice_a, choice_b, choice_c, choice_d: expected strings")
    if not raw["question"].strip():
        raise BadRow("empty_text", "the question has no text")
    if raw.get("answer") not in tuple(LETTERS[:4]):
        raise BadRow("bad_record", f"answer: expected A, B, C or D, got {str(raw.get('answer'))[:40]!r}")
    paths = {"image": f"SEED-Bench-image/{media}", "video": f"SEED-Bench-video-image/{kind}_{source_id}.png"}
    if raw.get("data_type") not in ("image", "video"):
        raise BadRow("unsupported_format", f"data_type: expected image or video, got {str(raw.get('data_type'))[:40]!r}")
    question = EvaluationQuestion(
        with_options(raw["question"], choices), [raw["answer"]], source_id, types.get(kind, kind), choices,
        {name: raw[name] for name in NOTES if name in raw},
    )  # fmt: skip
    return make_evaluation_row(source, block, question, "image", paths[raw["data_type"]])


def _types(uri: str) -> dict[str, str]:
    """The name of each type by its number as a string."""
    with storage.open_read(uri) as handle:
        try:
            return {str(number): name for name, number in ijson.kvitems(handle, "question_type")}
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise Refused(f"{KEY}: {uri}: expected complete JSON: {message_line(error)}") from error


FORMAT = Format(read)
