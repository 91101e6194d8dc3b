"""SEED-Bench: questions about images, and about videos whose middle frame was extracted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ingest import source

import pipelines
from voco.errors import JobFailed, Refused
from voco.ingest.evaluation_row import LETTER
from voco.ingest.formats.seed_json import read
from voco.ingest.source_row import Reject, SourceRow
from voco.job import spec
from voco.job.config import Ingest
from voco.job.load import build_job

TEST = Ingest(format="seed_json", dataset="seed", split="test")
TYPES = {"Scene Understanding": 1, "Action Recognition": 10}


def question(
    identity: Any, data_id: str, kind: int = 1, data_type: str = "image", answer: Any = "C", **keys: Any
) -> dict[str, Any]:
    choices = {f"choice_{letter}": f"option {letter}" for letter in "abcd"}
    about = {"data_id": data_id, "data_type": data_type, "question_type_id": kind, "question_id": identity}
    return {"answer": answer, **choices, **about, "question": f"What is {identity}?", **keys}


def write(path: Path, questions: list[Any]) -> str:
    path.write_text(json.dumps({"question_type": TYPES, "questions": questions}))
    return str(path)


def test_an_image_and_a_video(tmp_path) -> None:
    questions = [question("101", "145_259"), question("77", "task10/1.webm", 10, "video", segment=[1.5, 4]), question(5, "x", 3)]
    rows = [item for item in read(write(tmp_path / "SEED-Bench.json", questions), TEST, None) if isinstance(item, SourceRow)]
    assert [item.paths for item in rows] == [
        ("SEED-Bench-image/145_259",), ("SEED-Bench-video-image/10_77.png",), ("SEED-Bench-image/x",),
    ]  # fmt: skip
    text = f"What is 101?\nA. option a\nB. option b\nC. option c\nD. option d\n{LETTER}"
    assert rows[0].conversation == {
        "source_id": "101", "turns": [{"role": "user", "text": text}], "placeholder": "before", "answers": ["C"],
        "choices": ["option a", "option b", "option c", "option d"], "category": "Scene Understanding",
        "extra": '{"data_id":"145_259","data_type":"image","question_type_id":1}',
    }  # fmt: skip
    assert [item.conversation["category"] for item in rows[1:]] == ["Action Recognition", "3"]
    assert json.loads(rows[1].conversation["extra"])["segment"] == [1.5, 4]


BAD: dict[str, tuple[Any, str, str]] = {
    "a list": ([], "bad_record", "expected an object"),
    "no id": (question(None, "a"), "bad_record", "question_id: expected"),
    "no medium": (question("1", " "), "bad_record", "data_id: expected"),
    "no question": (question("1", "a", question=" "), "empty_text", "no text"),
    "no choice": (question("1", "a", choice_d=None), "bad_record", "choice_d: expected strings"),
    "no answer": (question("1", "a", answer=None), "bad_record", "answer: expected A, B, C or D"),
    "another letter": (question("1", "a", answer="E"), "bad_record", "got 'E'"),
    "a sound": (question("1", "a", data_type="sound"), "unsupported_format", "got 'sound'"),
    "a path that climbs": (question("1", "../../a"), "unsafe_path", "not a path below"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_rejected(tmp_path, name: str) -> None:
    raw, reason, detail = BAD[name]
    (bad,) = read(write(tmp_path / "SEED-Bench.json", [raw]), TEST, None)
    assert isinstance(bad, Reject)
    assert bad.reason == reason
    assert detail in bad.detail


@pytest.mark.parametrize("text", ["[]", '{"annotations": [1]}', '{"questions": [{"question_id"', "x"])
def test_another_file_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "seed.json").write_text(text)
    with pytest.raises(Refused, match=r"inputs\.annotations: .*seed.json: "):
        list(read(str(tmp_path / "seed.json"), TEST, None))


def job(folder: Path, **block: Any) -> spec.Job:
    raw = {
        "name": "seed", "kind": "ingest", "output": str(folder / "out"),
        "inputs": {"annotations": str(folder / "SEED-Bench.json"), "media": str(folder / "images")},
        "ingest": {"format": "seed_json", "dataset": "seed", "split": "test", **block},
    }  # fmt: skip
    return build_job("test.yaml", raw)


def test_a_whole_job_with_and_without_frames(tmp_path) -> None:
    files = {"SEED-Bench-image/145_259": source.image(1), "SEED-Bench-video-image/10_77.png": source.image(2, "PNG")}
    source.write(tmp_path, [], files)
    questions = [question("101", "145_259"), question("77", "1.webm", 10, "video"), question("78", "2.webm", 10, "video")]
    write(tmp_path / "SEED-Bench.json", [*questions, question("102", "145_259", answer="A")])
    with pytest.raises(JobFailed, match="max_missing_share: 1 of 4 rows"):
        pipelines.run(job(tmp_path))
    done = pipelines.run(job(tmp_path, max_missing_share=0.3))
    assert (done.counts["written"], done.counts["rejected"]) == (3, {"missing_media": 1})
    samples = {row["media"][0]["path"]: row["conversations"] for row in source.table(tmp_path / "out", "samples")}
    assert {path: [talk["answers"] for talk in talks] for path, talks in samples.items()} == {
        "SEED-Bench-image/145_259": [["C"], ["A"]], "SEED-Bench-video-image/10_77.png": [["C"]],
    }  # fmt: skip
    (lost,) = source.table(tmp_path / "out", "rejects")
    assert "SEED-Bench-video-image/10_78.png" in lost["detail"]
