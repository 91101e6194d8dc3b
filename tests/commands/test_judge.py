"""`voco judge` against a real server that is slow, busy, broken or rude; killed in the middle, and continued."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import judge_server
from commands.judge_server import BadJudge

from pipelines import cli
from voco.evaluate import judge
from voco.store import parquet, schemas

ROOT = Path(__file__).parents[2]
KEY = "sk-secret-0123456789"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    BadJudge.requests.clear()
    BadJudge.bodies.clear()
    BadJudge.authorization.clear()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no proxy can reach this machine's loopback
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(judge, "FIRST_WAIT_S", 0.02)
    server = judge_server.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def write_lines(path: Path, questions: list[str]) -> Path:
    rows = [{"prompt": question, "references": ["a man"], "prediction": "man"} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(file: Path | str, endpoint: str, *options: str) -> int:
    return cli.main(["judge", str(file), "--endpoint", endpoint, "--model", "judge/v1", *options])


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_a_bad_server_is_judged_by_all_the_same(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """500, no JSON, 429 with Retry-After, closed and cut connections are repeated; replies without a verdict are counted."""
    questions = ["yes-1", "yes-2", "no-1", "flaky-1", "busy-1", "closed-1", "rambling-1", "refusing-1", "second-1"]
    file = write_lines(tmp_path / "p.jsonl", questions)
    assert run(file, endpoint) == 0
    counts = {"yes-1": 1, "flaky-1": 3, "busy-1": 2, "closed-1": 3, "rambling-1": 2, "refusing-1": 2, "second-1": 2}
    assert {name: BadJudge.requests[name] for name in counts} == counts
    folder = tmp_path / "p.jsonl.judge" / "judge-v1"
    summary = summary_of(folder)
    figure = summary["figures"][0]
    assert figure == {
        "n": None, "questions": 9, "yes": 4, "no": 3, "unparsable": 2, "accuracy": 4 / 7, "accuracy_at_least": 4 / 9,
        "score": (4 * 5 + 1 + 1 + 0) / 7, "categories": {},
    }  # fmt: skip
    assert (summary["judge"], summary["endpoint"], summary["reported_models"]) == ("judge/v1", "127.0.0.1", {"judge-0613": 9})
    assert summary["first_verdict"][:10] <= summary["last_verdict"][:10] == time.strftime("%Y-%m-%d", time.gmtime())
    assert BadJudge.bodies[0]["temperature"] == 0
    assert BadJudge.bodies[0]["model"] == "judge/v1"
    replies = {row["reply"] for row in map(json.loads, (folder / "verdicts.jsonl").read_text().splitlines())}
    assert "I think that the answer is right." in replies
    out = capsys.readouterr()
    assert "accuracy 57.14% (44.44% when they count as no), score 3.14 of 5; 9 answers, 2 replies without a verdict" in out.out
    assert set(BadJudge.authorization) == {f"Bearer {KEY}"}
    assert all(KEY not in path.read_text() for path in folder.iterdir())
    assert KEY not in out.out + out.err

    before = sum(BadJudge.requests.values())
    assert run(file, endpoint) == 0  # a second call asks nothing
    assert sum(BadJudge.requests.values()) == before
    assert "9 of 9 verdicts are there" in capsys.readouterr().err


def test_a_reply_that_never_ends_is_cut_and_the_rest_is_kept(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "p.jsonl", ["yes-1", "dripping-1", "no-1"])
    started = time.monotonic()
    assert run(file, endpoint, "--timeout", "0.5", "--attempts", "2") == 1
    assert time.monotonic() - started < 10
    assert BadJudge.requests == Counter({"yes-1": 1, "no-1": 1, "dripping-1": 2})
    assert "failed: 1 of 3 answers got no reply (127.0.0.1:" in capsys.readouterr().err
    folder = tmp_path / "p.jsonl.judge" / "judge-v1"
    assert not (folder / "summary.json").exists()
    assert len((folder / "verdicts.jsonl").read_text().splitlines()) == 2


def test_failures_are_limited(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "p.jsonl", ["yes-1", *(f"dead-{number}" for number in range(500))])
    assert run(file, endpoint, "--attempts", "2", "--max-failures", "4", "--parallel", "2") == 1
    assert sum(BadJudge.requests.values()) <= 1 + 2 * 7
    assert "5 answers got no reply, more than --max-failures 4; the latest: 127.0.0.1:" in capsys.readouterr().err


def test_a_filtered_question_is_not_repeated_and_the_rest_is_asked(endpoint: str, tmp_path: Path) -> None:
    assert run(write_lines(tmp_path / "p.jsonl", ["rejected-1", "yes-1"]), endpoint) == 1
    assert BadJudge.requests == Counter({"rejected-1": 1, "yes-1": 1})


@pytest.mark.parametrize(("question", "status"), [("denied-1", 401), ("moved-1", 307)])
def test_wrong_settings_end_the_run_at_once(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], question: str, status: int
) -> None:
    file = write_lines(tmp_path / "p.jsonl", [question, *(f"yes-{number}" for number in range(200))])
    assert run(file, endpoint, "--parallel", "1") == 2
    error = capsys.readouterr().err
    assert f"answered {status}" in error
    assert KEY not in error
    assert sum(BadJudge.requests.values()) == 1


def test_no_server_is_a_failure_that_names_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "FIRST_WAIT_S", 0.01)
    assert run(write_lines(tmp_path / "p.jsonl", ["yes-1"]), "http://127.0.0.1:9/v1", "--attempts", "2") == 1
    assert "127.0.0.1:9" in capsys.readouterr().err


def test_verdicts_of_two_judges_are_not_mixed(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "p.jsonl", ["yes-1"])
    assert run(file, endpoint, "--to", str(tmp_path / "v")) == 0
    assert run(file, endpoint, "--to", str(tmp_path / "v"), "--request", '{"max_tokens": null, "seed": 1}') == 2
    assert 'has verdicts with request {"max_tokens": 256, "temperature": 0}' in capsys.readouterr().err
    other = ["judge", str(file), "--endpoint", endpoint, "--model", "other", "--to", str(tmp_path / "v")]
    assert cli.main(other) == 2
    assert 'has verdicts with judge "judge/v1", got "other"; use --to' in capsys.readouterr().err
    assert run(file, endpoint, "--to", str(tmp_path / "w"), "--request", '{"max_tokens": null, "seed": 1}') == 0
    last = BadJudge.bodies[-1]
    assert (last["seed"], "max_tokens" in last, last["temperature"]) == (1, False, 0)


def test_two_processes_do_not_write_the_same_verdicts(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = write_lines(tmp_path / "p.jsonl", ["yes-1"]), tmp_path / "v"
    folder.mkdir()
    with (folder / "verdicts.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(file, endpoint, "--to", str(folder)) == 2
    assert "another `voco judge` writes there" in capsys.readouterr().err
    assert run(file, endpoint, "--to", str(folder)) == 0


def test_an_evaluation_is_judged_by_n_and_category(endpoint: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "yes-1", "n": 1, "category": "color"}, {"prompt": "no-1", "n": 1, "category": "number"},
        {"prompt": "yes-1", "n": 2, "category": "color"}, {"prompt": "yes-2", "n": 2, "category": "number"},
        {"prompt": "dead-1", "n": 1, "category": "color", "references": []},
    ]  # fmt: skip
    given = {"references": ["a"], "prediction": "b"}
    full = [dict.fromkeys(schemas.ANSWERS.names) | given | row for row in rows]
    table = parquet.to_table(full, schemas.ANSWERS)
    parquet.write_table(str(tmp_path / "out/answers/part-00000.parquet"), [table], schemas.ANSWERS)
    assert run(tmp_path / "out", endpoint) == 0
    figures = {figure["n"]: figure for figure in summary_of(tmp_path / "out/judge/judge-v1")["figures"]}
    assert (figures[1]["accuracy"], figures[2]["accuracy"]) == (0.5, 1.0)
    assert figures[1]["categories"]["number"]["yes"] == 0
    assert figures[1]["categories"]["color"]["yes"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "ftp://host"], "--endpoint: expected http"),
        (["--endpoint", "http://me:word@host/v1"], "expected no name and password in the URL"),
        (["--parallel", "0"], "expected --parallel"),
        (["--timeout", "nan"], "--timeout"),
        (["--request", "{"], "--request: expected a JSON object"),
        (["--request", '{"stream": true}'], "--request"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "p.jsonl", ["yes-1"])
    assert cli.main(["judge", str(file), "--endpoint", "http://127.0.0.1:9", "--model", "m", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "word" not in error or "password" in error


@pytest.mark.parametrize("operand", ["absent.jsonl", "absent", "s3://YOUR-BUCKET/out"])
def test_what_cannot_be_judged_is_refused(operand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    for name in (operand, "empty.jsonl"):
        assert cli.main(["judge", name, "--endpoint", "http://127.0.0.1:9", "--model", "m"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl"]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_killed_and_continued_it_asks_nothing_twice(blow: signal.Signals, tmp_path: Path) -> None:
    """Only what was under way at the kill, at most `--parallel` answers, is asked again. The last line was cut besides."""
    total, parallel = 120, 4
    file = write_lines(tmp_path / "p.jsonl", [f"{'yes' if number % 3 else 'no'}-{number}" for number in range(total)])
    verdicts = tmp_path / "p.jsonl.judge" / "judge-v1" / "verdicts.jsonl"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/commands/judge_server.py"), "0.05"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
    command = [sys.executable, "-m", "pipelines", "judge", str(file), "--endpoint", endpoint, "--model", "judge/v1"]
    command += ["--parallel", str(parallel)]
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not verdicts.exists() or verdicts.read_bytes().count(b"\n") < 12:
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(blow)
    assert first.wait(30) == (-9 if blow == signal.SIGKILL else 130)
    before = [json.loads(line)["key"] for line in verdicts.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 12 <= len(before) < total
    with verdicts.open("ab") as handle:
        handle.write(b'{"key": "cut')
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of {total} verdicts are there" in done.stderr
    server.terminate()
    requests = Counter(server.stdout.read().split())
    assert set(requests) == {json.loads(line)["prompt"] for line in file.read_text().splitlines()}
    assert sum(requests.values()) <= total + parallel
    keys = [json.loads(line)["key"] for line in verdicts.read_text().splitlines()]
    assert keys[: len(before)] == before
    assert len(keys) == len(set(keys)) == total
    figure = summary_of(verdicts.parent)["figures"][0]
    assert (figure["yes"], figure["no"], figure["unparsable"]) == (80, 40, 0)
