"""Joins the questions of an evaluation set with the answers in a second file: by a key, never by order.

The layout of the answers' file determines the key (`JoinKey`):
  GQA, VQAv2   question id
  TextVQA      (image_id, question): LLaVA's file has the image's id where the question's belongs
  POPE         (image, object), and the category where the answers have it: ids start again in each category, and commits of
               POPE spell the question in different ways ("in the imange?"), so the object stands for it
  MME          (subtask, file, question): two questions share an id; the answers are text files in its zip
All answers stay in memory, each distinct word once. The largest set, VQAv2 val, has 214,354 questions with ten answers each.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from voco.errors import Refused
from voco.ingest.evaluation_row import LETTER, SHORT
from voco.ingest.parsing import json_records
from voco.ingest.source_row import BadRow
from voco.store import storage

KEY = "inputs.answers"
INSTRUCTIONS = (SHORT, LETTER, "Please answer yes or no.")  # one of the two files has them after the question, the other may not
OCR = "Reference OCR token:"  # starts the line of TextVQA's prompts that lists what an OCR system read
NOTES = ("question_id", "types", "question_type", "answer_type", "type", "fullAnswer", "image_classes")  # go to `extra`
MEMBER_BYTES = 1 << 20  # most bytes of one text file in MME's zip
# POPE's question in any of its commits: the one of LLaVA's questions, e3e3926, has "imange" where later ones have "image"
POPE_QUESTION = re.compile(r"is there an? (?P<object>\S.*?) in the iman?ge ?\??")

Key = tuple[str, ...]
Record = dict[str, Any]


@dataclass(frozen=True)
class AnswerKey:
    """The answers to one question, and its NOTES as JSON."""

    answers: tuple[str, ...]
    notes: str = "{}"


@dataclass(frozen=True)
class JoinKey:
    """The key that joins a question with its answers, computed from either side's record."""

    label: str
    question: Callable[[Record], Key]
    answer: Callable[[Record], Key]


def record_id(record: Record, *names: str) -> str:
    """The first of these ids in the record, a string or an integer. Raises BadRow when there is none."""
    for name in names or ("question_id", "id"):
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    raise BadRow("bad_record", f"{(names or ('question_id',))[0]}: expected a string or an integer")


def bare_question(record: Record) -> str:
    """The question in lower case, without instructions, OCR tokens and line breaks."""
    text = record.get("text", record.get("question"))
    if not isinstance(text, str):
        raise BadRow("bad_record", f"text: expected a string, got {type(text).__name__}")
    lines = " ".join(line for line in text.split("\n") if not line.lstrip().startswith(OCR))
    question = " ".join(lines.split())
    while ends := [end for end in INSTRUCTIONS if question.endswith(end)]:
        question = question.removesuffix(ends[0]).rstrip()
    return question.lower()


def pope_object(record: Record) -> str | None:
    """The object that a question of POPE asks for, in lower case; None for a question of another form. Raises BadRow."""
    match = POPE_QUESTION.fullmatch(bare_question(record))
    return match["object"] if match else None


def _asked(record: Record) -> str:
    name = pope_object(record)
    return bare_question(record) if name is None else f"is there a {name} in the image?"


def _file(record: Record) -> str:
    return record_id(record, "image").rsplit("/", 1)[-1]


def _subtask(record: Record) -> Key:
    subtask, _, path = record_id(record).partition("/")
    return subtask, path.rsplit("/", 1)[-1].rsplit(".", 1)[0], bare_question(record)


BY_ID = JoinKey("question_id", lambda row: (record_id(row),), lambda record: (record_id(record),))
BY_IMAGE_ID = JoinKey(
    "(image_id, question)",
    lambda row: (record_id(row), bare_question(row)),
    lambda record: (record_id(record, "image_id"), bare_question(record)),
)
BY_IMAGE = JoinKey("(image, question)", lambda row: (_file(row), _asked(row)), lambda record: (_file(record), _asked(record)))
BY_SUBTASK = JoinKey("(subtask, file, question)", _subtask, _subtask)


class AnswerKeys:
    """All answers of a file by their key. Raises Refused for a file in none of the layouts."""

    def __init__(self, uri: str) -> None:
        self.name = uri.rsplit("/", 1)[-1]
        self.join, records = _open(uri)
        self.answers: dict[Key, AnswerKey | None] = {}  # None: the file has different answers for this key
        self.questions: dict[Key, int] = {}  # a hash of the question that each key was looked up for
        for record in records:
            self._add(record)
        if not self.answers:
            raise Refused(f"{KEY}: {uri}: expected records with {self.join.label} and an answer, got none")

    def _add(self, record: Any) -> None:
        if not isinstance(record, dict):
            return
        try:
            key = self.join.answer(record)
        except BadRow:  # the question with this answer will be rejected: it has none
            return
        answers = record_answers(record)
        if not answers:
            return
        notes = {name: record[name] for name in NOTES if name in record and not (name == "question_id" and self.join is BY_ID)}
        new = AnswerKey(answers, sys.intern(json.dumps(notes)))
        for spelled in {key, self._with_category(key, record)}:
            first = self.answers.setdefault(spelled, new)
            if first is not None and first.answers != answers:
                self.answers[spelled] = None

    def _with_category(self, key: Key, record: Record) -> Key:
        """The key with the record's category, of answers that are joined by image; else the key itself."""
        category = record.get("category")
        return (*key, category) if self.join is BY_IMAGE and isinstance(category, str) else key

    def lookup(self, row: Record) -> AnswerKey:
        """The answers to a question. Raises BadRow: no answers, conflicting answers, or the key of an earlier, other question."""
        key = self.join.question(row)
        if (precise := self._with_category(key, row)) in self.answers:
            key = precise
        shown = f"{self.join.label} {', '.join(key)[:120]!r}"
        if key not in self.answers:
            raise BadRow("bad_record", f"no answer: {self.name} has no {shown}")
        reference = self.answers[key]
        if reference is None:
            raise BadRow("bad_record", f"{self.name} has different answers for {shown}")
        text = _asked(row) if self.join is BY_IMAGE else [row.get("text"), row.get("question")]
        question = hash(json.dumps([*(row.get(name) for name in ("image", "video_id", "video_name")), text]))
        if self.questions.setdefault(key, question) != question:
            raise BadRow("bad_record", f"{shown} belongs to an earlier, other question too")
        return reference


def _open(uri: str) -> tuple[JoinKey, Iterable[Any]]:
    if uri.lower().endswith(".zip"):
        return BY_SUBTASK, _subtasks(uri)
    kind = json_records.detect_layout(uri, KEY)
    if kind == json_records.DATA:
        return BY_IMAGE_ID, (record for _, record in json_records.iterate_records(uri, KEY, kind))
    if kind in (json_records.BY_ID, json_records.ANNOTATIONS, json_records.QUESTIONS):
        return BY_ID, _with_ids(uri, kind)
    first = next((record for _, record in json_records.iterate_records(uri, KEY, kind) if isinstance(record, dict)), {})
    join = BY_ID
    if "text" in first or "question" in first:
        join = BY_IMAGE if "image" in first else BY_SUBTASK if "/" in str(first.get("question_id")) else BY_ID
    return join, _with_ids(uri, kind)


def _with_ids(uri: str, kind: str) -> Iterator[Any]:
    for key, record in json_records.iterate_records(uri, KEY, kind):
        yield {**record, "question_id": key} if key and isinstance(record, dict) else record


def _subtasks(uri: str) -> Iterator[Record]:
    """MME's release: `<subtask>/[questions_answers_YN/]<file>.txt`, each with two lines: a question, a tab, the answer."""
    try:
        with storage.open_read(uri) as handle, zipfile.ZipFile(handle) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                folders = [part for part in path.parts[:-1] if part != "questions_answers_YN"]
                if path.suffix != ".txt" or not folders or member.file_size > MEMBER_BYTES:
                    continue
                with archive.open(member) as file:
                    text = file.read(MEMBER_BYTES).decode("utf-8", "replace")
                for line in text.splitlines():
                    question, tab, answer = line.rpartition("\t")
                    if tab:
                        yield {"question_id": f"{folders[-1]}/{path.name}", "question": question, "answer": answer.strip()}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise Refused(f"{KEY}: {uri}: expected a zip archive that can be read: {error}") from error


def record_answers(record: Record) -> tuple[str, ...]:
    """From `answers` (strings, or objects with `answer`), `answer` or POPE's `label`; empty when the record has none."""
    listed = record.get("answers")
    if not isinstance(listed, list):
        listed = [record.get("answer", record.get("label"))]
    values = [item.get("answer") if isinstance(item, dict) else item for item in listed]
    answers = [str(value) for value in values if isinstance(value, str | int) and not isinstance(value, bool)]
    return tuple(sys.intern(answer) for answer in answers) if any(answer.strip() for answer in answers) else ()
