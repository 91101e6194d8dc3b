"""Predictions of questions without references, in the form of each set's server or judge: golden files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from voco.evaluate.predictions import ANY_SET, FORMS, prediction_form, question_id, short_answer


def answer(source_id: str, prediction: str, **keys: Any) -> dict[str, Any]:
    row = {"source_id": source_id, "prediction": prediction, "prompt": "What?", "image": "VizWiz_test_00000000.jpg"}
    row |= {"sample_id": "0" * 32, "conversation_index": 0, "checkpoint": "s3://bucket/runs/voco-2", "method": "voco", "n": 2}
    return row | keys


TWO = [answer("0", "A red\nbus."), answer("1", "Two")]


@pytest.mark.parametrize(
    ("benchmark", "content"),
    [
        ("vqav2-test-dev", [{"question_id": 0, "answer": "a red bus"}, {"question_id": 1, "answer": "two"}]),
        (
            "VizWiz",
            [{"image": "VizWiz_test_00000000.jpg", "answer": text} for text in ("a red bus", "two")],
        ),
        ("MM-Vet", {"v1_0": "A red\nbus.", "v1_1": "Two"}),
    ],
)
def test_files_of_json(benchmark: str, content: Any) -> None:
    form = prediction_form(benchmark)
    assert (form.extension, json.loads(form.text(TWO))) == ("json", content)


def test_files_of_lines() -> None:
    form = prediction_form("llava-bench-in-the-wild")
    assert form.extension == "jsonl"
    lines = [json.loads(line) for line in form.text([*TWO, answer("1", "Two", sample_id="1" * 32)]).splitlines()]
    ids = [line.pop("answer_id") for line in lines]
    assert lines[0] == {
        "question_id": 0, "prompt": "What?", "text": "A red\nbus.", "model_id": "voco-2", "metadata": {},
    }  # fmt: skip
    assert list(json.loads(form.text(TWO).splitlines()[0])) == [
        "question_id",
        "prompt",
        "text",
        "answer_id",
        "model_id",
        "metadata",
    ]
    assert [len(identity) for identity in ids] == [22] * 3
    assert ids[1] != ids[2]
    assert form.text(TWO) == form.text(TWO)
    other = prediction_form("my-own-set")
    assert other is ANY_SET
    assert other.text(TWO) == '{"question_id": 0, "prediction": "A red\\nbus."}\n{"question_id": 1, "prediction": "Two"}\n'


def test_forms_are_chosen_by_the_start_of_the_name() -> None:
    for name, start in {
        "VQAv2": "vqav2",
        "vqav2_test": "vqav2",
        "vizwiz-vqa": "vizwiz",
        "mmvet": "mmvet",
        "mm_vet": "mmvet",
    }.items():
        assert prediction_form(name) is FORMS[start]
    for name in ("my-vqav2", "gqa", ""):
        assert prediction_form(name) is ANY_SET


def test_mmvets_own_ids_stay() -> None:
    assert list(json.loads(FORMS["mmvet"].text([answer("v1_10", "x"), answer("7", "y")]))) == ["v1_10", "v1_7"]


@pytest.mark.parametrize(("text", "identity"), [("262144000", 262144000), ("007", "007"), ("n1", "n1"), ("-1", "-1"), ("²", "²")])
def test_ids_are_numbers_where_their_text_is_one(text: str, identity: int | str) -> None:
    assert question_id(answer(text, "x")) == identity


@pytest.mark.parametrize(("text", "short"), [("  Yes.. ", "yes"), ("3.5", "3.5"), ("A\n B", "a b"), (".", ""), ("", "")])
def test_short_answers_are_as_annotators_write_them(text: str, short: str) -> None:
    assert short_answer(answer("1", text)) == short
