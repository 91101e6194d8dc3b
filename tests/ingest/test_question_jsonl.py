"""LLaVA's evaluation layout with each set's own files: answers are joined by a key, never by order."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ingest import source

import pipelines
from voco.errors import JobFailed, Refused
from voco.ingest.answer_keys import bare_question
from voco.ingest.evaluation_row import SHORT
from voco.ingest.formats.question_jsonl import read
from voco.ingest.source_row import Reject, SourceRow
from voco.job import spec
from voco.job.config import Ingest
from voco.job.load import build_job
from voco.run import manifest

TEST = Ingest(format="question_jsonl", dataset="set", split="test", max_text_bytes=3000)


def question(identity: Any, image: str, text: str, category: str = "default", **keys: Any) -> dict[str, Any]:
    return {"question_id": identity, "image": image, "text": f"{text}\n{SHORT}", "category": category, **keys}


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), errors="surrogateescape")
    return str(path)


def write_json(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def talks(items: list[SourceRow | Reject]) -> list[dict[str, Any]]:
    assert all(isinstance(item, SourceRow) for item in items), items
    return [item.conversation for item in items if isinstance(item, SourceRow)]


def test_gqa_by_id_out_of_order(tmp_path) -> None:
    questions = [question("201", "n1.jpg", "Is the cup blue?"), question("202", "n1.jpg", "What is it on?")]
    keyed = {
        "202": {"question": "What is it on?", "answer": "table", "imageId": "n1", "types": {"structural": "query"}},
        "999": {"question": "Who?", "answer": "man", "imageId": "n2"},
        "201": {"question": "Is the cup blue?", "answer": "no", "imageId": "n1", "types": {"structural": "verify"}},
    }
    rows = list(read(lines(tmp_path / "q.jsonl", questions), TEST, write_json(tmp_path / "gqa.json", keyed)))
    assert talks(rows)[0] == {
        "source_id": "201", "turns": [{"role": "user", "text": f"Is the cup blue?\n{SHORT}"}], "placeholder": "before",
        "answers": ["no"], "choices": [], "category": "default", "extra": '{"types":{"structural":"verify"}}',
    }  # fmt: skip
    assert [talk["answers"] for talk in talks(rows)] == [["no"], ["table"]]
    assert [item.paths for item in rows if isinstance(item, SourceRow)] == [("n1.jpg",)] * 2
    flat = lines(tmp_path / "a.jsonl", [{"question_id": "202", "answer": "table"}, {"question_id": 201, "answer": "no"}])
    assert [talk["answers"] for talk in talks(list(read(str(tmp_path / "q.jsonl"), TEST, flat)))] == [["no"], ["table"]]


VQA = {
    "info": {"description": "val"},
    "annotations": [
        {"question_id": 12, "image_id": 1, "answer_type": "other", "question_type": "what",
         "answers": [{"answer": word, "answer_confidence": "yes"} for word in ["red"] * 4 + ["pink"] * 6]},
        {"question_id": 11, "image_id": 1, "answer_type": "number", "question_type": "how many",
         "answers": [{"answer": "2", "answer_confidence": "yes"} for _ in range(10)]},
    ],
}  # fmt: skip


def test_vqav2_keeps_ten_answers(tmp_path) -> None:
    questions = [
        question(11, "COCO_val2014_000000000001.jpg", "How many?"),
        question(12, "COCO_val2014_000000000001.jpg", "What colour?"),
    ]
    path, answers = lines(tmp_path / "q.jsonl", questions), write_json(tmp_path / "v2.json", VQA)
    first, second = talks(list(read(path, TEST, answers)))
    assert (first["answers"], second["answers"]) == (["2"] * 10, ["red"] * 4 + ["pink"] * 6)
    assert json.loads(second["extra"]) == {"answer_type": "other", "question_type": "what"}
    trained = talks(list(read(path, TEST.model_copy(update={"split": "train"}), answers)))[1]
    assert (trained["turns"][-1], trained["answers"]) == ({"role": "assistant", "text": "pink"}, [])


def test_vqav2s_own_questions_are_llavas_rows(tmp_path) -> None:
    """Out of order and among bad questions: the same conversations and media as from LLaVA's lines."""
    questions = [
        {"image_id": 1, "question": "What colour?", "question_id": 12},
        {"image_id": 262148, "question": "How many?", "question_id": 11},
        {"image_id": "1", "question": "How many?", "question_id": 11}, {"image_id": 1, "question_id": 12}, [],
        {"image_id": 1, "question": "Who?", "question_id": 13}, {"image_id": 1, "question": "Who?"},
    ]  # fmt: skip
    own = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "questions": questions, "data_subtype": "val2014"}
    answers = write_json(tmp_path / "v2.json", VQA)
    rows = list(read(write_json(tmp_path / "own.json", own), TEST, answers))
    llava = [
        question(12, "COCO_val2014_000000000001.jpg", "What colour?"), question(11, "COCO_val2014_000000262148.jpg", "How many?"),
    ]  # fmt: skip
    equal = list(read(lines(tmp_path / "q.jsonl", llava), TEST, answers))
    assert [(item.paths, item.conversation) for item in rows[:2]] == [(item.paths, item.conversation) for item in equal]
    bad = [item for item in rows[2:] if isinstance(item, Reject)]
    assert [(item.reason, item.source) for item in bad] == [("bad_record", f"own.json:{index}") for index in range(2, 7)]


def test_gqas_own_questions_have_their_answers(tmp_path) -> None:
    own = {
        "202": {"semantic": [{"operation": "select", "argument": "cup"}], "question": "What is it on?", "answer": "table",
                "imageId": "n1", "isBalanced": True, "types": {"structural": "query"}, "fullAnswer": "It is on a table."},
        "201": {"question": "Is the cup blue?", "answer": "no", "imageId": "n1", "types": {"structural": "verify"}},
        "203": {"question": "Who?", "answer": "man"}, "204": 5, "205": {"question": "Why?", "imageId": "n2"},
    }  # fmt: skip
    path = write_json(tmp_path / "testdev_balanced_questions.json", own)
    llava = lines(
        tmp_path / "q.jsonl", [question("202", "n1.jpg", "What is it on?"), question("201", "n1.jpg", "Is the cup blue?")]
    )
    for answers in (None, path):
        rows = list(read(path, TEST, answers))
        equal = list(read(llava, TEST, path))
        assert [(item.paths, item.conversation) for item in rows[:2]] == [(item.paths, item.conversation) for item in equal]
        assert [item.reason for item in rows[2:] if isinstance(item, Reject)] == ["bad_record"] * 3
    assert [talk["answers"] for talk in talks(rows[:2])] == [["table"], ["no"]]


@pytest.mark.parametrize(
    "text", ['{"questions": [{"question_id": 1}]}', '{"data_subtype": "val2014", "questions": [{"image_id": 1,']
)
def test_incomplete_own_questions_are_refused(tmp_path, text: str) -> None:
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(Refused, match=r"inputs.annotations: .*own.json: "):
        list(read(str(tmp_path / "own.json"), TEST, None))


def test_textvqa_by_image_and_question(tmp_path) -> None:
    questions = [
        {"question_id": "ab12", "image": "ab12.jpg", "text": f"What is the Brand?\nReference OCR token: ACME, 12\n{SHORT}"},
        {"question_id": "ab12", "image": "ab12.jpg", "text": f"what number is shown?\nReference OCR token: ACME, 12\n{SHORT}"},
        {"question_id": "cd34", "image": "cd34.jpg", "text": f"what is the brand?\n{SHORT}"},
        {"question_id": "ef56", "image": "ef56.jpg", "text": f"what is the brand?\n{SHORT}"},
    ]
    data = [
        {"question_id": 3, "image_id": "cd34", "question": "what is the brand?", "answers": ["globex"] * 10},
        {"question_id": 2, "image_id": "ab12", "question": "what number is shown?", "answers": ["12"] * 9 + [""]},
        {"question_id": 1, "image_id": "ab12", "question": "what is the brand?", "answers": ["acme"] * 10},
    ]
    rows = list(
        read(lines(tmp_path / "q.jsonl", questions), TEST, write_json(tmp_path / "t.json", {"dataset_type": "val", "data": data}))
    )
    assert [talk["answers"] for talk in talks(rows[:3])] == [["acme"] * 10, ["12"] * 9 + [""], ["globex"] * 10]
    assert [json.loads(talk["extra"])["question_id"] for talk in talks(rows[:3])] == [1, 2, 3]
    assert isinstance(rows[3], Reject)
    assert (rows[3].reason, rows[3].source) == ("bad_record", "q.jsonl:3")
    assert "t.json has no (image_id, question) 'ef56, what is the brand?'" in rows[3].detail


def test_pope_whose_ids_start_again_in_each_category(tmp_path) -> None:
    image = "COCO_val2014_000000000009.jpg"
    questions = [
        question(0, image, "Is there a dog in the image?", "adversarial"),
        question(1, image, "Is there a car in the image?", "adversarial"),
        question(2, image, "Is there a dog in the image?", "popular"),
        question(3, image, "Is there a bus in the image?", "random"),
    ]
    labels = [  # the three files concatenated: id 1 is three questions, and id 2 is not LLaVA's 2
        {"question_id": 1, "image": image, "text": "Is there a dog in the image?", "label": "yes"},
        {"question_id": 2, "image": image, "text": "Is there a car in the image?", "label": "no"},
        {"question_id": 1, "image": image, "text": "Is there a dog in the image?", "label": "yes"},
        {"question_id": 1, "image": image, "text": "Is there a bus in the image?", "label": "no"},
    ]
    rows = list(read(lines(tmp_path / "q.jsonl", questions), TEST, lines(tmp_path / "labels.json", labels)))
    talks_read = [(talk["source_id"], talk["answers"], talk["category"]) for talk in talks(rows)]
    assert talks_read == [
        ("0", ["yes"], "adversarial"), ("1", ["no"], "adversarial"), ("2", ["yes"], "popular"), ("3", ["no"], "random"),
    ]  # fmt: skip


def test_popes_own_file_needs_no_other_and_asks_as_llavas_does(tmp_path) -> None:
    row = {"question_id": 1, "image": "COCO_val2014_000000000009.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    joined_before = {**row, "text": f"Is there a dog in the image?\n{SHORT}"}  # a file that was joined with LLaVA's
    for own in (row, joined_before):
        (talk,) = talks(list(read(lines(tmp_path / "coco_pope_popular.json", [own]), TEST, None)))
        assert (talk["answers"], talk["category"], talk["extra"]) == (["yes"], "popular", "{}")
        assert talk["turns"] == [{"role": "user", "text": f"Is there a dog in the image?\n{SHORT}"}]
    llava = lines(tmp_path / "llava.jsonl", [question(1, row["image"], row["text"], "popular")])
    (joined,) = talks(list(read(llava, TEST, lines(tmp_path / "labels.json", [row]))))
    assert joined == {**talk, "extra": '{"question_id":1}'}  # of the label
    other = {**row, "text": "What is the label?"}  # a label alone makes no question of POPE
    (talk,) = talks(list(read(lines(tmp_path / "x.jsonl", [other]), TEST, None)))
    assert (talk["turns"][0]["text"], talk["category"]) == ("What is the label?", "")


def test_popes_commits_spell_a_question_differently(tmp_path) -> None:
    """The object decides, not the words around it; an object that merely contains the other's name is another one."""
    image = "COCO_val2014_000000000009.jpg"
    labels_of = {
        "Is there an umbrella in the imange?": "yes", "Is there an oven in the imange?": "no",
        "Is there a dining table in the image?": "yes", "Is there a hot dog in the image?": "yes",
    }  # fmt: skip
    labelled = (
        "Is there an umbrella in the image?", "Is there a oven in the image?", "is there a dining table in the image",
        "Is there a dog in the image?",
    )  # fmt: skip
    labels = [
        {"question_id": number, "image": image, "image_id": 9, "text": text, "label": label}
        for number, (text, label) in enumerate(zip(labelled, labels_of.values(), strict=True))
    ]
    questions = [question(number, image, text, "random") for number, text in enumerate(labels_of)]
    *rows, hot_dog = read(lines(tmp_path / "q.jsonl", questions), TEST, lines(tmp_path / "labels.json", labels))
    assert [talk["answers"] for talk in talks(rows)] == [["yes"], ["no"], ["yes"]]
    assert [talk["turns"][0]["text"] for talk in talks(rows)] == [f"{text}\n{SHORT}" for text in list(labels_of)[:3]]
    assert isinstance(hot_dog, Reject)
    assert "labels.json has no (image, question)" in hot_dog.detail


def test_popes_labels_with_categories_are_joined_by_them(tmp_path) -> None:
    """Labels that contradict each other in two categories: known categories keep both, unknown ones reject the question."""
    image, text = "COCO_val2014_000000000009.jpg", "Is there a dog in the image?"
    questions = lines(
        tmp_path / "q.jsonl", [question(number, image, text, name) for number, name in enumerate(("random", "popular"))]
    )
    labels = [
        {"image": image, "text": text, "label": label, "category": name} for name, label in (("popular", "no"), ("random", "yes"))
    ]
    assert [talk["answers"] for talk in talks(list(read(questions, TEST, lines(tmp_path / "a.json", labels))))] == [
        ["yes"],
        ["no"],
    ]
    bare = [{key: value for key, value in row.items() if key != "category"} for row in labels]
    rejects = list(read(questions, TEST, lines(tmp_path / "b.json", bare)))
    assert ["different answers" in item.detail for item in rejects if isinstance(item, Reject)] == [True, True]


def test_a_list_of_questions_is_as_good_as_lines(tmp_path) -> None:
    """Pretty-printed, on one line, after a byte order mark; a broken element costs itself, an open list is refused."""
    rows = [question(1, "a.jpg", "What?", answer="x"), question(2, "b.jpg", "Where?", answer="y"), 7, {"question_id": 3}]
    expected = list(read(lines(tmp_path / "q.jsonl", rows), TEST, None))
    for number, text in enumerate((json.dumps(rows, indent=2), json.dumps(rows), "\ufeff\n" + json.dumps(rows, indent=1))):
        path = tmp_path / f"{number}" / "q.jsonl"
        path.parent.mkdir()
        path.write_text(text)
        assert list(read(str(path), TEST, None)) == expected
    assert [type(item) for item in expected] == [SourceRow, SourceRow, Reject, Reject]
    (tmp_path / "q.jsonl").write_text(json.dumps(rows, indent=2)[:-2])
    with pytest.raises(Refused, match=r"inputs.annotations: .*q.jsonl: expected complete JSON"):
        list(read(str(tmp_path / "q.jsonl"), TEST, None))


def test_question_stands_for_text(tmp_path) -> None:
    rows = [{"question_id": 1, "image": "a.jpg", "question": "What?", "answer": "x", "text": "Which?"}]
    rows.append({key: value for key, value in rows[0].items() if key != "text"})
    first, second = talks(list(read(lines(tmp_path / "q.jsonl", rows), TEST, None)))
    assert (first["turns"][0]["text"], first["extra"]) == ("Which?", '{"question":"What?"}')
    assert (second["turns"][0]["text"], second["extra"]) == ("What?", "{}")


def test_mme_two_questions_of_the_same_id(tmp_path) -> None:
    cats, code = "Are there two cats? Please answer yes or no.", "Is the output 0? Please answer yes or no."
    questions = [question("count/0007.jpg", "count/0007.jpg", text, "count") for text in (cats, cats.replace("two", "three"))]
    questions.append(question(".", "count/0007.jpg", cats))  # no subtask and no file, which must not stop the others
    questions.append(question("code_reasoning/0007.png", "code_reasoning/0007.png", code, "code_reasoning"))
    with zipfile.ZipFile(tmp_path / "mme.zip", "w") as archive:
        archive.writestr("MME/count/questions_answers_YN/0007.txt", f"{cats.replace('two', 'three')}\tNo\n{cats}\tYes\n")
        archive.writestr("MME/code_reasoning/0007.txt", f"{code}\tYes\r\n")
        archive.writestr("MME/count/images/0007.jpg", source.image(1))
    rows = list(read(lines(tmp_path / "llava_mme.jsonl", questions), TEST, str(tmp_path / "mme.zip")))
    assert isinstance(rows.pop(2), Reject)
    assert [talk["answers"] for talk in talks(rows)] == [["Yes"], ["No"], ["Yes"]]
    assert [talk["source_id"] for talk in talks(rows)] == ["count/0007.jpg"] * 2 + ["code_reasoning/0007.png"]


@pytest.mark.parametrize(
    "text",
    [
        f"What  Brand?\n{SHORT}", "what brand?", f"What brand?\nReference OCR token: a, b\n{SHORT}",
        f"Reference OCR token: a, b\nWhat brand?\n{SHORT}", f"What brand? Please answer yes or no.\n{SHORT}",
    ],
)  # fmt: skip
def test_the_question_without_its_surrounding_text(text: str) -> None:
    assert bare_question({"text": text}) == "what brand?"


BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not JSON"),
    "not a number": ('{"question_id": NaN}', "not JSON: NaN"),
    "nested without end": ("[" * 100_000, "not JSON"),
    "bytes of no text": ('{"question_id": "\udcff"}', "not JSON"),
    "a list": ("[1]", "expected an object, got list"),
    "no text": ({"question_id": "201", "image": "a.jpg"}, "text: expected a string"),
    "no image": ({"question_id": "201", "text": "What?"}, "image: expected a string"),
    "no id": ({"image": "a.jpg", "text": "What?"}, "question_id: expected a string or an integer"),
    "an id without an answer": (question("404", "a.jpg", "What?"), "no answer: a.jsonl has no question_id '404'"),
    "an id answered twice": (question("203", "a.jpg", "What?"), "different answers for question_id '203'"),
    "an answer of blanks": (question("204", "a.jpg", "What?"), "no answer: a.jsonl has no question_id '204'"),
    "an id of two questions": (question("201", "a.jpg", "Why?"), "question_id '201' belongs to an earlier, other question too"),
    "an unsafe path": (question("205", "../a.jpg", "What?"), "not a path below"),
    "no question": ({"question_id": "205", "image": "a.jpg", "text": " "}, "the question has no text"),
    "a long text": (question("206", "a.jpg", "x" * 3000), "bytes of text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_rejected(tmp_path, name: str) -> None:
    raw, detail = BAD[name]
    answers = [
        {"question_id": "201", "answer": "no"}, {"question_id": "201", "answer": "no"}, {"question_id": "203", "answer": "a"},
        {"question_id": "203", "answer": "b"}, {"question_id": "204", "answer": " "}, {"question_id": "205", "answer": "c"},
        "{", [], {"question_id": "206", "answer": "d"},
    ]  # fmt: skip
    questions = [question("201", "a.jpg", "What?"), raw, question("201", "a.jpg", "What?")]
    first, bad, again = read(lines(tmp_path / "q.jsonl", questions), TEST, lines(tmp_path / "a.jsonl", answers))
    assert isinstance(bad, Reject)
    assert detail in bad.detail
    assert isinstance(first, SourceRow)
    assert isinstance(again, SourceRow)
    assert first.turns == again.turns  # so grouping calls it a duplicate


@pytest.mark.parametrize("text", ["", "no JSON", '{"annotations": [{"question_id": 1, "ans', "[]", "3"])
def test_a_file_that_is_no_answers_file_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    path = lines(tmp_path / "q.jsonl", [question("1", "a.jpg", "What?")])
    with pytest.raises(Refused, match=r"inputs.answers: .*a.json: "):
        list(read(path, TEST, str(tmp_path / "a.json")))
    (tmp_path / "a.zip").write_text("no zip")
    with pytest.raises(Refused, match=r"inputs.answers: .*a.zip: expected a zip archive"):
        list(read(path, TEST, str(tmp_path / "a.zip")))


def job(folder: Path, **block: Any) -> spec.Job:
    raw = {
        "name": "ingest-eval", "kind": "ingest", "output": str(folder / "out"),
        "inputs": {"annotations": f"{folder}/q.jsonl", "answers": f"{folder}/a.jsonl", "media": f"{folder}/images"},
        "ingest": {"format": "question_jsonl", "dataset": "set", "split": "test", "max_reject_share": 1.0, **block},
    }  # fmt: skip
    return build_job("test.yaml", raw)


def test_a_whole_job_and_its_second_source(tmp_path) -> None:
    source.write(tmp_path, [], {"a.jpg": source.image(1), "b.png": source.image(2, "PNG")})
    questions = [
        question(1, "a.jpg", "What?", "popular"), question(2, "b.png", "Where?"), question(3, "a.jpg", "What?", "random"),
        question(4, "gone.jpg", "What?"), question(5, "a.jpg", "Why?"), question(1, "a.jpg", "What?", "popular"),
    ]  # fmt: skip
    lines(tmp_path / "q.jsonl", questions)
    lines(tmp_path / "a.jsonl", [{"question_id": n, "answer": f"answer {n % 2}"} for n in (4, 3, 2, 1)])
    done = pipelines.run(job(tmp_path, max_missing_share=1.0))
    assert done.counts["read"] == 6
    assert done.counts["rejected"] == {"bad_record": 1, "duplicate": 1, "missing_media": 1}
    assert [Path(entry["uri"]).name for entry in done.source] == ["q.jsonl", "a.jsonl"]
    samples = {row["media"][0]["path"]: row for row in source.table(tmp_path / "out", "samples")}
    assert [talk["answers"] for talk in samples["a.jpg"]["conversations"]] == [["answer 1"], ["answer 1"]]  # not duplicates
    assert [talk["category"] for talk in samples["a.jpg"]["conversations"]] == ["popular", "random"]
    assert samples["b.png"]["media"][0]["bytes"] == source.image(2, "PNG")
    before = manifest.job_run_id(job(tmp_path))
    lines(tmp_path / "a.jsonl", [{"question_id": 1, "answer": "another"}])
    assert manifest.job_run_id(job(tmp_path)) != before


def test_rows_without_an_answer_fail_the_job_by_default(tmp_path) -> None:
    source.write(tmp_path, [], {"a.jpg": source.image(1)})
    lines(tmp_path / "q.jsonl", [question(1, "a.jpg", "What?"), question(2, "a.jpg", "Where?")])
    lines(tmp_path / "a.jsonl", [{"question_id": 2, "answer": "here"}])
    with pytest.raises(JobFailed, match="max_reject_share: 1 of 2 rows"):
        pipelines.run(job(tmp_path, max_reject_share=0.01))


def test_answers_are_only_for_formats_with_a_separate_answers_file(tmp_path) -> None:
    source.write(tmp_path, *source.good(2, 1))
    lines(tmp_path / "a.jsonl", [{"question_id": 2, "answer": "here"}])
    (tmp_path / "q.jsonl").write_text((tmp_path / "mix.json").read_text())
    with pytest.raises(Refused, match=r"inputs\.answers: expected nothing: llava_json"):
        pipelines.run(job(tmp_path, format="llava_json"))


def test_a_byte_order_mark_and_empty_lines(tmp_path) -> None:
    buffer = io.BytesIO(b"\xef\xbb\xbf\n" + json.dumps(question(1, "a.jpg", "What?")).encode() + b"\n\n")
    (tmp_path / "q.jsonl").write_bytes(buffer.getvalue())
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"question_id": 1, "answer": "x"}]')
    assert [talk["answers"] for talk in talks(list(read(str(tmp_path / "q.jsonl"), TEST, str(tmp_path / "a.json"))))] == [["x"]]
