"""`voco score METRIC FILE.jsonl`: marks anyone's predictions by a benchmark's rule. Needs no model, no Ray and no torch.

A line of the file is one answer:

    {"prediction": "Yes, there is.", "references": ["yes"], "category": "popular", "image": "COCO_val2014_000000310196.jpg",
     "choices": [], "question_id": 17}

Only `prediction` and `references` are required, and other keys are ignored. Each line's mark goes to a file beside it, the set's
official figures to the screen. A line without references gets no mark and is in no figure.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voco.errors import Refused, message_line
from voco.evaluate.metrics import Figures, MarkedAnswer, Metric, figure_text, get_metric, mark_answer, official_figures

MARKS = ".marks.jsonl"  # the end of the default output's name
OPTIONAL = ("category", "image", "question_id")


def run_score(options: argparse.Namespace) -> int:
    """Mark the file's lines, write the marks, and print the figures. Returns the exit code."""
    metric, file = get_metric(options.operand), Path(options.file)
    output = Path(options.output) if options.output else file.with_name(file.name.removesuffix(".jsonl") + MARKS)
    if output.resolve() == file.resolve():
        raise Refused(f"--output: {output} is the file of predictions; name another one")
    answers = list(read_answer_lines(file, metric))
    if not answers:
        raise Refused(f"{file}: expected a line for each answer, got none")
    _write(output, "".join(json.dumps(_marked(answer)) + "\n" for answer in answers))
    unmarked = sum(answer["mark"] is None for answer in answers)
    without = f", {unmarked:,} without references" if unmarked else ""
    count = "1 answer" if len(answers) == 1 else f"{len(answers):,} answers"
    print(f"{metric.name}: {count}{without}; marks in {output}")
    print(figures_table(official_figures(metric, answers), metric))
    return 0


def read_answer_lines(file: Path, metric: Metric) -> Iterator[MarkedAnswer]:
    """The file's answers with their marks and line numbers. Empty lines are skipped.

    Raises Refused for a file that cannot be read, and with its number for a line that is no answer.
    """
    try:
        with file.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    try:
                        answer = parse_answer(line, metric.needs)
                    except ValueError as error:
                        raise Refused(f"{file}: line {number}: {message_line(error)}") from error
                    mark = mark_answer(metric, answer["prediction"], answer["references"], answer["choices"])
                    yield {"line": number, **answer, "mark": mark}
    except OSError as error:
        raise Refused(f"{file}: {error.strerror or message_line(error)}") from error


def parse_answer(line: bytes, needs: tuple[str, ...] = ()) -> MarkedAnswer:
    """One line's answer; numbers become text, but in `question_id`. Raises ValueError with what is wrong with it."""
    try:
        raw = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, got byte {line[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"expected one JSON object, got an error at character {error.pos + 1}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("expected one JSON object, got one that is nested too deeply") from error
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {_kind(raw)}")
    if not isinstance(raw.get("prediction"), str):
        raise ValueError(f"prediction: expected a string, got {_kind(raw.get('prediction'))}")
    answer = {"prediction": raw["prediction"], "references": _strings(raw, "references"), "choices": []}
    if raw.get("choices") is not None:
        answer["choices"] = _strings(raw, "choices")
    for key in OPTIONAL:
        value = raw.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise ValueError(f"{key}: expected a string, got {_kind(value)}")
        if value in (None, "") and key in needs:
            raise ValueError(f"{key}: this metric needs it on every line, got nothing")
        answer[key] = str(value) if isinstance(value, int) and key != "question_id" else value
    return answer


def _strings(raw: dict[str, Any], key: str) -> list[str]:
    values = raw.get(key)
    if not isinstance(values, list):
        raise ValueError(f"{key}: expected a list of strings, got {_kind(values)}")
    wrong = next((value for value in values if not isinstance(value, str)), None)
    if wrong is not None or None in values:
        raise ValueError(f"{key}: expected a list of strings, got {_kind(wrong)} in it")
    return values


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "nothing")


def _marked(answer: MarkedAnswer) -> dict[str, Any]:
    """The line of an answer's mark: the number of its line, its id where it has one, and the mark."""
    identity = {"question_id": answer["question_id"]} if answer["question_id"] is not None else {}
    return {"line": answer["line"], **identity, "mark": answer["mark"]}


def _write(output: Path, text: str) -> None:
    """Write the whole file or none of it. Raises Refused where it cannot be written."""
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Refused(f"--output: {output}: {error.strerror or message_line(error)}") from error


def figures_table(figures: Figures, metric: Metric) -> str:
    """The figures as a table, the published one first, and the metric's note below."""
    if not figures:
        return "no answer has references: no figures"
    names = sorted(figures, key=lambda name: name != metric.headline)
    width = max(map(len, names))
    lines = [f"{name:<{width}}  {figure_text(figures[name]):>10}" for name in names]
    return "\n".join(lines + ([f"note: {metric.note}"] if metric.note else []))
