"""ScienceQA as LLaVA packs it: questions as conversations, joined by id with the problems that have their answers.

    [{"id": "4", "image": "4/image.png", "conversations": [{"from": "human", "value": "<image>\\nWhich is ...\\nOptions: (A) ...
      (B) ..."}, {"from": "gpt", "value": "The answer is A."}]}, ...]                        llava_test_CQM-A.json
    {"4": {"choices": ["...", "..."], "answer": 0, "subject": "natural science", ...}, ...}    problems.json, `inputs.answers`

The answer is the letter of the problem's choice, the category its subject. Rows without an image are text only; the published
figure counts rows with an image only. The gpt turn is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from voco.errors import Refused
from voco.ingest.answer_keys import KEY
from voco.ingest.evaluation_row import LETTER, LETTERS, EvaluationQuestion, make_evaluation_row
from voco.ingest.formats import Format, llava_json
from voco.ingest.parsing import json_list, json_records
from voco.ingest.source_row import BadRow, Reject, SourceRow, parse_rows
from voco.job.config import Ingest

NOTES = ("topic", "category", "skill", "grade", "task", "split")  # keys of the problem that go to `extra`

Problem = dict[str, Any]


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row of the file, in order. Raises Refused when it is not one JSON list, or without a file of problems."""
    if answers is None:
        raise Refused(f"{KEY}: expected ScienceQA's problems.json, got nothing")
    problems = _problems(answers)
    return parse_rows(uri, json_list.iterate_list(uri), lambda raw, _, source: parse(raw, source, block, problems))


def parse(raw: Any, source: str, block: Ingest, problems: dict[str, Problem]) -> SourceRow:
    """One row as a SourceRow. Raises BadRow for its first fault."""
    row = llava_json.parse(raw, source, block)
    identity = row.conversation["source_id"]
    problem = problems.get(identity)
    if problem is None:
        raise BadRow("bad_record", f"no answer: the problems have no id {identity[:40]!r}")
    if len(row.turns) > 2:
        raise BadRow("bad_conversation", f"expected one question, got {len(row.turns)} turns")
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadRow("bad_record", f"choices of problem {identity[:40]}: expected a list of strings")
    if not isinstance(answer, int) or not 0 <= answer < min(len(choices), len(LETTERS)):
        raise BadRow("bad_record", f"answer of problem {identity[:40]}: expected the number of one of {len(choices)} choices")
    text = row.turns[0][1].strip()
    if not text:
        raise BadRow("empty_text", "the question has no text")
    subject = problem.get("subject")
    question = EvaluationQuestion(
        f"{text}\n{LETTER}", [LETTERS[answer]], identity, subject if isinstance(subject, str) else "", choices,
        {name: problem[name] for name in NOTES if name in problem},
    )  # fmt: skip
    return make_evaluation_row(source, block, question, row.modality, row.paths[0] if row.paths else None)


def _problems(uri: str) -> dict[str, Problem]:
    """The keys that are read of every problem, by its id."""
    if json_records.detect_layout(uri, KEY) != json_records.BY_ID:
        raise Refused(f"{KEY}: {uri}: expected an object of problems by their id, each with `answer`")
    keys = {"choices", "answer", "subject", *NOTES}
    records = json_records.iterate_records(uri, KEY, json_records.BY_ID)
    return {
        identity: {name: value for name, value in record.items() if name in keys}
        for identity, record in records
        if isinstance(record, dict)
    }


FORMAT = Format(read, takes_answers=True)
