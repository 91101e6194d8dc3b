"""Parquet files with images inside, as Hugging Face datasets are: one file, or a folder of them in the order of their names.

Training rows have `messages` (LLaMA-Factory, OpenAI), `conversations` (LLaVA-OneVision-Data), `texts` of user and assistant (the
Cauldron), or `query` and `response`; they are read as `chat_json` reads them. Rows of evaluation sets have lmms-lab's columns:

    question_id | id | index   question   image   answer | answers   options | A B C D ...   hint   category

A set with options is asked as MMBench is, any other with LLaVA's instruction for short answers. The columns of images are
recognised by their type: `{bytes, path}`, a list of those, or bytes in a column called image or like a file extension. Rows with
the same image become one sample. Other columns go to `extra`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from voco.errors import Refused, message_line
from voco.ingest.evaluation_row import LETTERS, SHORT, EvaluationQuestion, make_evaluation_row, with_options
from voco.ingest.formats import Format, chat_json
from voco.ingest.formats.mmbench_tsv import field_text
from voco.ingest.media.parquet_images import ParquetImages, encoded_images, file_uris, image_columns, image_path
from voco.ingest.source_row import BadRow, Reject, SourceRow, parse_rows
from voco.job.config import Ingest
from voco.store import parquet

CONVERSATIONS = ("messages", "conversations", "conversation", "query", "texts")
IDS, CATEGORIES, OPTIONS = ("question_id", "id", "index"), ("category", "sub_task", "question_type"), ("options", "choices")
OWN_COLUMNS = {*IDS, *CATEGORIES, *OPTIONS, "question", "hint", "answer", "answers", *LETTERS}

Raw = tuple[dict[str, Any], list[str], str]  # a row's values, its image columns, its location


def read(uri: str, block: Ingest, answers: str | None) -> Iterator[SourceRow | Reject]:
    """Every row of every file, in order. Raises Refused for a file that is not Parquet or has neither layout's columns."""
    first_seen: dict[str, str] = {}  # where the images of a row were first seen, by their paths
    for file in file_uris(uri):
        yield from parse_rows(file, _rows(file), lambda raw, _, source: parse(raw, source, block, first_seen))


def _rows(uri: str) -> Iterator[Raw]:
    name = uri.rsplit("/", 1)[-1]
    try:
        with parquet.open_parquet(uri) as file:
            schema = file.schema_arrow
            if "question" not in schema.names and not set(CONVERSATIONS) & set(schema.names):
                expected = f"a column `question`, or one of {', '.join(CONVERSATIONS)}"
                raise Refused(f"inputs.annotations: {uri}: expected {expected}, got {', '.join(schema.names)[:200]}")
            columns = image_columns(schema)
            for group in range(file.num_row_groups):
                row = 0
                for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                    for values in batch.to_pylist():
                        yield values, columns, f"{name}:{group}:{row}"
                        row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise Refused(f"inputs.annotations: {uri}: expected a complete Parquet file: {message_line(error)}") from error


def parse(raw: Raw, source: str, block: Ingest, first_seen: dict[str, str]) -> SourceRow:
    """One row as a SourceRow, whose images are read where they first appeared. Raises BadRow for its first fault."""
    values, columns, location = raw
    paths = [image_path(data) for data in encoded_images(values, columns)]
    values = {name: value for name, value in values.items() if name not in columns and value is not None}
    if any(name in values for name in CONVERSATIONS):
        row = chat_json.parse(_as_chat(values, paths), source, block)
    else:
        row = _question(values, paths, source, block)
    return dataclasses.replace(row, location=first_seen.setdefault("/".join(paths), location) if paths else "")


def _as_chat(values: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """The row as `chat_json` takes it."""
    if "texts" in values and isinstance(values["texts"], list):
        pairs = [{"human": turn.get("user"), "assistant": turn.get("assistant")} for turn in values.pop("texts")]
        values = {**values, "conversation": pairs}
    return {**values, "image" if "conversations" in values else "images": paths}


def _question(values: dict[str, Any], paths: list[str], source: str, block: Ingest) -> SourceRow:
    """A question of an evaluation set. Raises BadRow."""
    question = values.get("question")
    if not isinstance(question, str):
        raise BadRow("bad_record", f"question: expected a string, got {type(question).__name__}")
    if len(paths) != 1:
        raise BadRow("unsupported_format" if paths else "missing_media", f"a question with {len(paths)} images; expected 1")
    choices = _choices(values)
    text = "\n".join(part for part in (field_text(str(values.get("hint", ""))), question) if part)
    if choices:
        text = with_options(text, choices)
    elif question.strip() and SHORT not in text:
        text = f"{text}\n{SHORT}"
    identity = next((str(values[name]) for name in IDS if name in values), "")
    category = next((str(values[name]) for name in CATEGORIES if name in values), "")
    extra = {name: value for name, value in values.items() if name not in OWN_COLUMNS and _is_json(value)}
    evaluation = EvaluationQuestion(text, _answers(values, choices), identity, category, choices, extra)
    return make_evaluation_row(source, block, evaluation, "image", paths[0])


def _choices(values: dict[str, Any]) -> list[str]:
    """The options of a multiple choice question, in order; none for an open one."""
    for name in OPTIONS:
        listed = values.get(name)
        if isinstance(listed, str) and listed.startswith("["):  # MMMU writes its list as text
            try:
                listed = json.loads(listed.replace("'", '"'))
            except ValueError:
                continue
        if isinstance(listed, list) and listed:
            return [str(option) for option in listed]
    choices: list[str] = []
    for letter in LETTERS:
        option = field_text(str(values.get(letter, "")))
        if not option:
            break
        choices.append(option)
    return choices


def _answers(values: dict[str, Any], choices: list[str]) -> list[str]:
    """The references: ten annotators' answers, a list, or the single answer; a number is the index of an option."""
    listed = values.get("answers", values.get("answer"))
    references = listed if isinstance(listed, list) else [listed]
    texts = [item.get("answer") if isinstance(item, dict) else item for item in references]
    if choices:
        texts = [LETTERS[text] if isinstance(text, int) and 0 <= text < len(choices) else text for text in texts]
    return [str(text) for text in texts if text is not None]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


FORMAT = Format(read, open_media=lambda block, annotations: ParquetImages(annotations))
