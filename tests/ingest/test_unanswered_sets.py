"""Evaluation sets whose answers are not published: their questions are samples without references, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ingest import source
from ingest.test_question_jsonl import job, lines, question, talks, write_json

import pipelines
from voco.errors import JobFailed
from voco.ingest.evaluation_row import SHORT, UNANSWERED
from voco.ingest.formats.question_jsonl import read
from voco.ingest.source_row import Reject, SourceRow
from voco.job.config import Ingest

TEST = Ingest(format="question_jsonl", dataset="set", split="test")
VIZWIZ = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"  # of LLaVA's llava_test.jsonl

# A file of each set: two questions as its authors publish them, or as LLaVA does, and what the first one becomes.
SETS: dict[str, tuple[Any, tuple[str, str, str]]] = {
    "VQAv2 test-dev": (
        {"data_subtype": "test-dev2015", "questions": [
            {"image_id": 262144, "question": "Is the ball flying?", "question_id": 262144000},
            {"image_id": 262144, "question": "Who?", "question_id": 262144001}]},
        ("262144000", "COCO_test2015_000000262144.jpg", f"Is the ball flying?\n{SHORT}"),
    ),
    "VQAv2 test": (
        {"data_subtype": "test2015", "questions": [{"image_id": 1, "question": "Who?", "question_id": 10}] * 2},
        ("10", "COCO_test2015_000000000001.jpg", f"Who?\n{SHORT}"),
    ),
    "GQA test": (
        {"201": {"isBalanced": True, "question": "Who?", "imageId": "n1"}, "202": {"question": "Why?", "imageId": "n1"}},
        ("201", "n1.jpg", f"Who?\n{SHORT}"),
    ),
    "VizWiz test": (
        [{"image": "VizWiz_test_00007999.jpg", "question": "What's in this picture"},
         {"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}],
        ("7999", "VizWiz_test_00007999.jpg", f"What's in this picture\n{VIZWIZ}"),
    ),
    "MM-Vet": (
        {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "x=-1<AND>x=-5", "imagesource": "https://h",
                  "capability": ["ocr", "math"]},
         "v1_1": {"imagename": "v1_1.png", "question": "Why?", "answer": "-1", "capability": []}},
        ("v1_0", "v1_0.png", "What is x?"),
    ),
    "LLaVA's MM-Vet": (
        [{"image": "v1_208.png", "text": "Summarize.\n\nWrite 150 words.", "category": "conv", "question_id": 208},
         {"image": "v1_209.png", "text": "Who?", "category": "conv", "question_id": 209}],
        ("208", "v1_208.png", "Summarize.\n\nWrite 150 words."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_set_without_answers(tmp_path, name: str) -> None:
    content, (source_id, image, text) = SETS[name]
    rows = list(read(write_json(tmp_path / "q.json", content), TEST, None))
    assert len(talks(rows)) == 2
    first = rows[0]
    assert isinstance(first, SourceRow)
    assert (first.conversation["source_id"], first.paths, first.conversation["answers"]) == (source_id, (image,), [])
    assert first.conversation["turns"] == [{"role": "user", "text": text}]
    assert first.notes == (UNANSWERED,)


def test_what_mmvets_judge_needs_is_kept(tmp_path) -> None:
    first, _ = talks(list(read(write_json(tmp_path / "q.json", SETS["MM-Vet"][0]), TEST, None)))
    assert json.loads(first["extra"]) == {
        "capability": ["ocr", "math"], "imagesource": "https://h", "reference": "x=-1<AND>x=-5",
    }  # fmt: skip


def test_vizwiz_val_has_its_answers(tmp_path) -> None:
    answers = [{"answer": word, "answer_confidence": "yes"} for word in ["soda"] * 6 + ["unanswerable"] * 4]
    row = {"image": "VizWiz_val_00000003.jpg", "question": "What?", "answers": answers, "answer_type": "other", "answerable": 1}
    (talk,) = talks(list(read(write_json(tmp_path / "val.json", [row]), TEST, None)))
    assert talk["answers"] == ["soda"] * 6 + ["unanswerable"] * 4
    assert json.loads(talk["extra"]) == {"answer_type": "other", "answerable": 1}


def test_a_missing_answer_among_others_stays_a_reject(tmp_path) -> None:
    """Wherever it is: the first row's answer may be the missing one. So do rows of training, which have nothing to learn."""
    missing = question(1, "a.jpg", "What?")
    for rows in ([missing, question(2, "a.jpg", "Who?", answer="x")], [question(2, "a.jpg", "Who?", answers=["x"]), missing]):
        read_rows = list(read(lines(tmp_path / "q.jsonl", rows), TEST, None))
        (bad,) = [item for item in read_rows if isinstance(item, Reject)]
        assert (bad.reason, "no answer" in bad.detail) == ("bad_record", True)
    training = TEST.model_copy(update={"split": "train"})
    (bad,) = read(lines(tmp_path / "q.jsonl", [missing]), training, None)
    assert isinstance(bad, Reject)


def without_answers(folder: Path, **block: Any) -> Any:
    unanswered = job(folder, max_reject_share=0.01, **block)
    return unanswered.model_copy(update={"inputs": unanswered.inputs.model_copy(update={"answers": None})})


def test_the_whole_job_says_how_many_have_none(tmp_path, capsys) -> None:
    source.write(tmp_path, [], {"001.jpg": source.image(1)})
    bench = [{"question_id": n, "image": "001.jpg", "category": "conv", "text": f"Why {n}?"} for n in range(3)]  # LLaVA-Bench
    lines(tmp_path / "q.jsonl", bench)
    done = pipelines.run(without_answers(tmp_path))
    assert done.counts == {"read": 3, "written": 3, "samples": 1, "rejected": {}}
    (row,) = source.table(tmp_path / "out", "samples")
    assert [talk["answers"] for talk in row["conversations"]] == [[], [], []]
    assert f"3 {UNANSWERED}" in capsys.readouterr().out
    with pytest.raises(JobFailed, match="max_reject_share: 3 of 3 rows"):
        pipelines.run(without_answers(tmp_path, split="train").model_copy(update={"output": str(tmp_path / "train")}))
