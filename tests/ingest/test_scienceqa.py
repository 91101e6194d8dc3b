"""ScienceQA: conversations and the problems with their answers, joined by id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ingest import source

import pipelines
from voco.errors import Refused
from voco.ingest.evaluation_row import LETTER
from voco.ingest.formats.scienceqa import read
from voco.ingest.source_row import Reject, SourceRow
from voco.job.config import Ingest
from voco.job.load import build_job

TEST = Ingest(format="scienceqa", dataset="sqa", split="test")
OPTIONS = "Context: N/A\nOptions: (A) iron (B) wood"


def row(
    identity: str, image: str | None = None, answer: str = "The answer is A.", question: str = "Which is hard?"
) -> dict[str, Any]:
    return source.row(identity, image, f"{'' if image is None else '<image>' + chr(10)}{question}\n{OPTIONS}", answer)


def problem(answer: Any = 1, **keys: Any) -> dict[str, Any]:
    defaults = {"question": "Which is hard?", "choices": ["iron", "wood"], "answer": answer, "hint": "", "image": None}
    return {**defaults, "subject": "natural science", "topic": "physics", "grade": "grade2", "lecture": "x", **keys}


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def test_a_row_and_its_problem(tmp_path) -> None:
    problems = {"9": problem(0, subject="social science"), "5": problem(0), "4": problem(1)}
    rows = [row("4", "4/image.png"), row("9")]
    parsed = list(read(write(tmp_path / "llava.json", rows), TEST, write(tmp_path / "problems.json", problems)))
    image, text = (item for item in parsed if isinstance(item, SourceRow))
    assert (image.modality, image.paths, text.modality, text.paths) == ("image", ("4/image.png",), "text", ())
    assert image.conversation == {
        "source_id": "4", "turns": [{"role": "user", "text": f"Which is hard?\n{OPTIONS}\n{LETTER}"}], "placeholder": "before",
        "answers": ["B"], "choices": ["iron", "wood"], "category": "natural science",
        "extra": '{"grade":"grade2","topic":"physics"}',
    }  # fmt: skip
    summary = (text.conversation["answers"], text.conversation["category"], text.conversation["placeholder"])
    assert summary == (["A"], "social science", "none")


BAD: dict[str, tuple[Any, str, str]] = {
    "no problem": (row("404"), "bad_record", "no answer: the problems have no id '404'"),
    "no id": (row("1") | {"id": None}, "bad_record", "no answer: the problems have no id ''"),
    "an answer beyond the choices": (row("2"), "bad_record", "answer of problem 2: expected the number of one of 2 choices"),
    "an answer that is a word": (row("3"), "bad_record", "answer of problem 3"),
    "no choices": (row("5"), "bad_record", "choices of problem 5"),
    "two questions": (source.row("1", None, "a", "b", "c", "d"), "bad_conversation", "expected one question, got 4 turns"),
    "a placeholder alone": (source.row("1", "a.png", "<image>", "A"), "empty_text", "no text"),
    "a path that climbs": (row("1", "../a.png"), "unsafe_path", "not a path below"),
    "a number": (7, "bad_record", "expected an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_rejected(tmp_path, name: str) -> None:
    raw, reason, detail = BAD[name]
    problems = {"1": problem(), "2": problem(2), "3": problem("wood"), "5": problem(choices="iron")}
    (bad,) = read(write(tmp_path / "llava.json", [raw]), TEST, write(tmp_path / "problems.json", problems))
    assert isinstance(bad, Reject)
    assert bad.reason == reason
    assert detail in bad.detail


def test_problems_are_needed(tmp_path) -> None:
    path = write(tmp_path / "llava.json", [row("1")])
    with pytest.raises(Refused, match=r"inputs\.answers: expected ScienceQA's problems"):
        list(read(path, TEST, None))
    with pytest.raises(Refused, match=r"inputs\.answers: .*expected an object of problems"):
        list(read(path, TEST, path))


def test_a_whole_job(tmp_path) -> None:
    source.write(tmp_path, [], {"4/image.png": source.image(4, "PNG")})
    raw = {
        "name": "sqa", "kind": "ingest", "output": str(tmp_path / "out"),
        "inputs": {
            "annotations": write(tmp_path / "llava.json", [row("4", "4/image.png"), row("9"), row("7"), row("6", "6/image.png")]),
            "answers": write(tmp_path / "problems.json", {"9": problem(0), "6": problem(0), "4": problem(1)}),
            "media": str(tmp_path / "images"),
        },
        "ingest": {"format": "scienceqa", "dataset": "sqa", "split": "test", "max_reject_share": 0.5, "max_missing_share": 0.5},
    }  # fmt: skip
    done = pipelines.run(build_job("test.yaml", raw))
    assert (done.counts["read"], done.counts["written"]) == (4, 2)
    assert done.counts["rejected"] == {"bad_record": 1, "missing_media": 1}
    samples = {row["modality"]: row for row in source.table(tmp_path / "out", "samples")}
    assert (samples["text"]["conversations"][0]["answers"], samples["image"]["conversations"][0]["answers"]) == (["A"], ["B"])
    assert samples["image"]["media"][0]["bytes"] == source.image(4, "PNG")
