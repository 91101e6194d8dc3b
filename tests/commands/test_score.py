"""`voco score`: marks of anyone's predictions in a file, figures on screen, faults of a file in one line, and a quick start."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli

START_S = 0.5  # seconds of processor time of a command that marks one line; of wall time on a machine that is not busy


def write(file: Path, lines: list[Any]) -> Path:
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


def marks(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def answer(prediction: str = "yes", *references: str, **keys: Any) -> dict[str, Any]:
    return {"prediction": prediction, "references": list(references or ("yes",)), **keys}


def test_marks_beside_the_file_and_figures_on_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        answer("Yes, there is.", "yes", category="popular", question_id=1, image="a.jpg", other={"ignored": 1}),
        answer("No", "yes", category="popular", question_id="two"),
        "",
        answer("yes", "yes", category="random"),
        {"prediction": "yes", "references": [], "category": "random"},
    ]
    file = write(tmp_path / "answers.jsonl", lines)
    assert cli.main(["score", "pope", str(file)]) == 0
    assert marks(tmp_path / "answers.marks.jsonl") == [
        {"line": 1, "question_id": 1, "mark": 1.0},
        {"line": 2, "question_id": "two", "mark": 0.0},
        {"line": 4, "mark": 1.0},
        {"line": 5, "mark": None},
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"pope: 4 answers, 1 without references; marks in {tmp_path / 'answers.marks.jsonl'}"
    assert out[1].split() == ["f1", "0.8333"]  # 2/3 and 1
    assert ["popular/recall", "0.5000"] in [line.split() for line in out]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.marks.jsonl"]


def test_the_published_figure_of_llava(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaVA-1.5 7B's counts on POPE (LLaVA issue 626): 0.8599."""
    lines = []
    for category, alarms, negatives in [("random", 31, 1410), ("popular", 59, 1500), ("adversarial", 117, 1500)]:
        lines += [answer("Yes" if index < 1183 else "No", "yes", category=category) for index in range(1500)]
        lines += [answer("Yes" if index < alarms else "No", "no", category=category) for index in range(negatives)]
    assert cli.main(["score", "pope", str(write(tmp_path / "pope.jsonl", lines))]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["f1", "0.8599"]


def test_another_output_choices_and_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = ["cat", "dog"]
    lines = [
        answer("the dog", "B", choices=choices, question_id=3),
        answer("cat", "B", choices=["dog", "cat"], question_id="1000003"),
    ]
    file = write(tmp_path / "predictions.txt", lines)
    assert cli.main(["score", "mmbench", str(file), "--output", str(tmp_path / "m.jsonl")]) == 0
    assert [row["mark"] for row in marks(tmp_path / "m.jsonl")] == [1.0, 1.0]
    out = capsys.readouterr().out
    assert ["circular_accuracy", "1.0000"] in [line.split() for line in out.splitlines()]
    assert "note: answers that match no option" in out
    assert cli.main(["score", "mmbench", str(file)]) == 0
    assert (tmp_path / "predictions.txt.marks.jsonl").exists()


def test_every_mark_is_written_where_the_set_is_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "mme.jsonl", [answer("Yes", "Yes", category="OCR", image="a.jpg")])
    assert cli.main(["score", "mme", str(file)]) == 2
    assert marks(tmp_path / "mme.marks.jsonl") == [{"line": 1, "mark": 1.0}]
    assert capsys.readouterr().err == (
        "refused: mme: OCR: expected two questions with the same image or question_id, got 1 about a.jpg\n"
    )


def test_a_set_without_any_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "vqa", str(write(tmp_path / "a.jsonl", [{"prediction": "x", "references": []}]))]) == 0
    assert "no answer has references: no figures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "line", "reason"),
    [
        ("gqa", "{", "expected one JSON object, got an error at character 3: Expecting property name enclosed in double quotes"),
        ("gqa", "[]", "expected an object, got a list"),
        ("gqa", "3", "expected an object, got a number"),
        ("gqa", "[" * 100_000, "expected one JSON object, got one that is nested too deeply"),
        ("gqa", {"references": ["a"]}, "prediction: expected a string, got nothing"),
        ("gqa", {"prediction": None, "references": ["a"]}, "prediction: expected a string, got nothing"),
        ("gqa", {"prediction": 3, "references": ["a"]}, "prediction: expected a string, got a number"),
        ("gqa", {"prediction": "a"}, "references: expected a list of strings, got nothing"),
        ("gqa", {"prediction": "a", "references": "a"}, "references: expected a list of strings, got a string"),
        ("gqa", {"prediction": "a", "references": ["a", 3]}, "references: expected a list of strings, got a number in it"),
        ("gqa", {"prediction": "a", "references": ["a", None]}, "references: expected a list of strings, got nothing in it"),
        ("gqa", answer(choices="AB"), "choices: expected a list of strings, got a string"),
        ("gqa", answer(category=["a"]), "category: expected a string, got a list"),
        ("gqa", answer(image=True), "image: expected a string, got true or false"),
        ("gqa", answer(question_id={}), "question_id: expected a string, got an object"),
        ("gqa", answer(question_id=1.5), "question_id: expected a string, got a number"),
        ("mmbench", answer(), "question_id: this metric needs it on every line, got nothing"),
        ("mme", answer(category=""), "category: this metric needs it on every line, got nothing"),
    ],
)
def test_a_line_that_is_no_answer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, line: Any, reason: str
) -> None:
    good = answer(question_id=0, category="OCR")
    file = write(tmp_path / "a.jsonl", [good, "", line])
    assert cli.main(["score", metric, str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"refused: {file}: line 3: {reason}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prediction": "a", "references": ["a"]}\n{"prediction": "\xff", "references": ["a"]}\n')
    assert cli.main(["score", "gqa", str(file)]) == 2
    assert capsys.readouterr().err == f"refused: {file}: line 2: expected UTF-8, got byte 0xff\n"


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, empty = write(tmp_path / "a.jsonl", [answer()]), write(tmp_path / "empty.jsonl", ["", " "])
    faults = [
        (["gqa", str(tmp_path / "missing.jsonl")], f"{tmp_path / 'missing.jsonl'}: No such file or directory"),
        (["gqa", str(tmp_path)], f"{tmp_path}: Is a directory"),
        (["gqa", str(empty)], f"{empty}: expected a line for each answer, got none"),
        (["gqa", str(file), "--output", str(file)], f"--output: {file} is the file of predictions; name another one"),
        (
            ["gqa", str(file), "--output", str(tmp_path / "no" / "m")],
            f"--output: {tmp_path / 'no' / 'm'}: No such file or directory",
        ),
    ]
    for arguments, reason in faults:
        assert cli.main(["score", *arguments]) == 2
        assert capsys.readouterr().err == f"refused: {reason}\n"
    assert cli.main(["score", "f2", str(file)]) == 2
    assert capsys.readouterr().err.startswith("refused: metrics: expected one of gqa, vqa, ")


def test_it_needs_no_ray_no_torch_and_no_model(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [answer(category="OCR", image="a", question_id=1)] * 2)
    code = """
import sys
from pipelines.cli import main
from voco.job.tables import METRICS
codes = {name: main(["score", name, sys.argv[1]]) for name in METRICS}
heavy = {"torch", "ray", "transformers", "deepspeed", "pandas", "numpy", "pyarrow", "wandb", "PIL", "pydantic", "yaml", "fsspec"}
print("LOADED", sorted(heavy & {name.split(".")[0] for name in sys.modules}), set(codes.values()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LOADED [] {0}" in done.stdout


def test_it_starts_quickly(tmp_path: Path) -> None:
    """The best of several starts, in processor time: other tests run beside it."""
    file, seconds = write(tmp_path / "a.jsonl", [answer()]), []
    code = "import sys; from pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, "score", "gqa", str(file)], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "accuracy      1.0000" in done.stdout, done.stderr
    assert min(seconds) < START_S
