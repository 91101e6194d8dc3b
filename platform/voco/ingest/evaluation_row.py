"""A question of an evaluation set as a source row, with the prompts that LLaVA gives to short answers and multiple choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from voco.ingest.source_row import BadRow, SourceRow, make_source_row
from voco.job.config import Ingest

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"  # of the options, in order
UNANSWERED = "questions without an answer: they are answered, and not scored"  # a note of SourceRow


@dataclass(frozen=True)
class EvaluationQuestion:
    """One question of an evaluation set, before it becomes a SourceRow."""

    text: str
    answers: Sequence[str]
    source_id: str
    category: str = ""
    choices: Sequence[str] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    of_unanswered_set: bool = False  # the set's answers are not published: the row may have none


def with_options(question: str, choices: Sequence[str]) -> str:
    """A multiple choice question as LLaVA asks it: each option after its letter, then the instruction."""
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *options, LETTER])


def make_evaluation_row(
    source: str, block: Ingest, question: EvaluationQuestion, modality: str, path: str | None, location: str = ""
) -> SourceRow:
    """The row of a question, with the placeholder before it. Outside val and test its most common answer is the assistant's turn.

    Questions with different ids or categories are never duplicates: POPE asks the same question in three categories. A question
    of a set without answers has no references, and a note says so.
    Raises BadRow: bad_record (no answer, in a set that has them) and those of `make_source_row`.
    """
    if not question.text.strip():
        raise BadRow("empty_text", "the question has no text")
    answers = [answer for answer in question.answers if answer.strip()]
    if not answers and not question.of_unanswered_set:
        raise BadRow("bad_record", "no answer: the row has none, and the job has no inputs.answers")
    answer = [("assistant", Counter(answers).most_common(1)[0][0])] if answers else []
    row = make_source_row(
        source, block, modality=modality, path=path, placeholder="none" if path is None else "before",
        turns=[("user", question.text), *answer], answers=question.answers,
        choices=question.choices, source_id=question.source_id, category=question.category, extra=question.extra,
        location=location,
    )  # fmt: skip
    if not answers:
        row = replace(row, notes=(*row.notes, UNANSWERED))
    if path is None:  # the sample id of a text-only row is a hash of its turns
        return row
    return replace(row, turns=(("question", f"{question.category}/{question.source_id}"), *row.turns))
