"""Short questions about videos, with the answer in the row or, ActivityNet-QA, in a second file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ingest import source
from ingest.clips import clip

import pipelines
from voco.errors import Refused
from voco.ingest.formats.video_qa import read
from voco.ingest.source_row import Reject, SourceRow
from voco.job.config import Ingest
from voco.job.load import build_job

TEST = Ingest(format="video_qa", dataset="qa", split="test", max_text_bytes=2000)


def write(path: Path, rows: Any) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def qa_row(identity: str, video: str = "AbCdEfGhIjK", question: str = "is the person outdoors") -> dict[str, Any]:
    return {"question_id": identity, "video_name": video, "question": question}


def test_msvd_rows_hold_their_answer(tmp_path) -> None:
    rows = [{"id": 12, "video_id": "vid1301", "question": "what is a man slicing?", "answer": "bread", "category_id": 3}]
    (item,) = read(write(tmp_path / "test_qa.json", rows), TEST, None)
    assert isinstance(item, SourceRow)
    assert (item.modality, item.paths) == ("video", ("vid1301",))
    assert item.conversation == {
        "source_id": "12", "turns": [{"role": "user", "text": "what is a man slicing?"}], "placeholder": "before",
        "answers": ["bread"], "choices": [], "category": "", "extra": '{"category_id":3}',
    }  # fmt: skip
    (trained,) = read(str(tmp_path / "test_qa.json"), TEST.model_copy(update={"split": "train"}), None)
    assert isinstance(trained, SourceRow)
    assert trained.conversation["turns"][1] == {"role": "assistant", "text": "bread"}


def test_activitynet_answers_by_id_out_of_order(tmp_path) -> None:
    hat = qa_row("a_2", question="what colour is the hat")
    questions = [qa_row("a_1"), hat, qa_row("a_3", question="how many"), qa_row("a_4")]
    answers = [
        {"question_id": "a_3", "answer": "2", "type": 7}, {"question_id": "a_1", "answer": "yes", "type": 3},
        {"question_id": "a_2", "answer": "red", "type": 4}, {"question_id": "a_4", "answer": "no", "type": 12},
    ]  # fmt: skip
    rows = list(read(write(tmp_path / "test_q.json", questions), TEST, write(tmp_path / "test_a.json", answers)))
    talks = [item.conversation for item in rows if isinstance(item, SourceRow)]
    summary = [(talk["source_id"], talk["answers"], talk["category"], talk["extra"]) for talk in talks]
    assert summary == [
        ("a_1", ["yes"], "yes/no", '{"type":3}'), ("a_2", ["red"], "color", '{"type":4}'),
        ("a_3", ["2"], "number", '{"type":7}'), ("a_4", ["no"], "12", '{"type":12}'),
    ]  # fmt: skip


BAD: dict[str, tuple[Any, str]] = {
    "a string": ("x", "expected an object"),
    "no question": ({"question_id": "a_1", "video_name": "v"}, "question: expected a string"),
    "an empty question": (qa_row("a_1", question=" "), "no text"),
    "no video": ({"question_id": "a_1", "question": "what"}, "video_id: expected a string"),
    "no id": ({"video_name": "v", "question": "what"}, "question_id: expected a string"),
    "no answer": (qa_row("a_9"), "no answer: test_a.json has no question_id 'a_9'"),
    "two answers": (qa_row("a_2"), "different answers for question_id 'a_2'"),
    "one id for two questions": (qa_row("a_0", question="another"), "belongs to an earlier, other question too"),
    "a path that climbs": (qa_row("a_1", video="../x"), "not a path below"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_rejected(tmp_path, name: str) -> None:
    raw, detail = BAD[name]
    answers = [{"question_id": identity, "answer": word, "type": 3} for identity, word in
               (("a_2", "yes"), ("a_1", "yes"), ("a_2", "no"), ("a_0", "yes"))]  # fmt: skip
    paths = write(tmp_path / "test_q.json", [qa_row("a_0"), raw]), write(tmp_path / "test_a.json", answers)
    first, bad = read(paths[0], TEST, paths[1])
    assert isinstance(first, SourceRow)
    assert isinstance(bad, Reject)
    assert detail in bad.detail


def test_a_file_that_is_no_list_is_refused(tmp_path) -> None:
    with pytest.raises(Refused, match=r"inputs\.annotations: .*test_q.json: expected a JSON list"):
        list(read(write(tmp_path / "test_q.json", {"a": 1}), TEST, None))


def test_a_whole_job_with_real_videos(tmp_path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v_AbCdEfGhIjK.mp4").write_bytes(clip())
    (tmp_path / "videos" / "vid7.mkv").write_bytes(clip("matroska", seed=1))
    questions = [qa_row("a_1"), qa_row("b_1", "vid7"), qa_row("a_2", question="how many"), qa_row("c_1", "gone"), qa_row("d_1")]
    raw = {
        "name": "qa", "kind": "ingest", "output": str(tmp_path / "out"),
        "inputs": {
            "annotations": write(tmp_path / "test_q.json", questions), "media": str(tmp_path / "videos"),
            "answers": write(tmp_path / "test_a.json", [
                {"question_id": name, "answer": f"answer {name}", "type": 3} for name in ("c_1", "a_2", "b_1", "a_1")
            ]),
        },
        "ingest": {"format": "video_qa", "dataset": "qa", "split": "test", "max_reject_share": 0.5},
    }  # fmt: skip
    done = pipelines.run(build_job("test.yaml", raw))
    assert (done.counts["read"], done.counts["written"]) == (5, 3)
    assert done.counts["rejected"] == {"bad_record": 1, "missing_media": 1}
    samples = {row["media"][0]["path"]: row for row in source.table(tmp_path / "out", "samples")}
    assert {path: [talk["answers"][0] for talk in row["conversations"]] for path, row in samples.items()} == {
        "v_AbCdEfGhIjK.mp4": ["answer a_1", "answer a_2"], "vid7.mkv": ["answer b_1"],
    }  # fmt: skip
    assert samples["vid7.mkv"]["media"][0]["num_frames"] == 20
