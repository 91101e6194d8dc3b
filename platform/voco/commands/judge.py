"""`voco judge`: a language model's verdicts on the answers of an evaluation, or on anyone's predictions in JSON lines.

The judge is any server of OpenAI's chat completions. Each verdict is appended to `verdicts.jsonl` when it arrives, so a run that
was stopped or killed continues and asks nothing twice; `judge.json` names the judge whose verdicts these are; `summary.json` is
written when every answer has a reply. Requests, waits and failures are limited: a run always ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from voco.errors import JobFailed, Refused, message_line
from voco.evaluate import judge
from voco.evaluate.judge import JudgedAnswer, Verdict
from voco.run.proxies import bypass_proxy, is_loopback
from voco.store import storage

API_KEY = "OPENAI_API_KEY"
PATH = "/chat/completions"
BODY_BYTES = 4 << 20  # most bytes of a reply
PROGRESS_S = 10.0
REQUEST = {"temperature": 0, "max_tokens": 256}  # fields of every request beside model and messages


@dataclass(frozen=True)
class JudgeOptions:
    """Whom to ask, and how patiently. `request` overrides fields of REQUEST; a null leaves a field out."""

    endpoint: str
    model: str
    parallel: int = 8
    timeout_s: float = 60.0  # of one request, from the connection to the last byte
    attempts: int = 5  # of one answer
    max_failures: int = 10  # answers without a reply after all attempts; one more ends the run
    request: str = "{}"


class _Failure(Exception):
    """An answer that got no reply in all its attempts."""


def run_judge(options: Namespace) -> int:
    """`options` come from the command line: the operand is an evaluation's output or a .jsonl file."""
    settings = JudgeOptions(
        options.endpoint,
        options.model,
        options.parallel,
        options.timeout,
        options.attempts,
        options.max_failures,
        options.request,
    )
    _check(settings)
    folder = Path(os.path.expanduser(options.to) if options.to else default_folder(options.operand, settings.model))
    answers = read_judged_answers(options.operand)
    with open_verdicts(folder, settings) as log:
        judge_answers(answers, settings, log)
        print(write_summary(folder, answers, log.verdicts, settings))
    return 0


def _check(options: JudgeOptions) -> None:
    if options.parallel < 1 or options.attempts < 1 or options.max_failures < 0 or not 0 < options.timeout_s <= 3600:
        raise Refused("expected --parallel and --attempts of at least 1, --max-failures of at least 0, --timeout of at most 3600")
    completions_url(options.endpoint)
    request_fields(options)


def completions_url(endpoint: str) -> str:
    """The URL of chat completions: of `https://HOST/v1` or with the full path. Raises Refused."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise Refused(f"--endpoint: expected http(s)://HOST/v1, got {parts.scheme or endpoint[:40]}")
    if parts.username is not None or parts.password is not None:
        raise Refused(f"--endpoint: expected no name and password in the URL; the key is read from {API_KEY}")
    return endpoint if parts.path.endswith(PATH) else endpoint.rstrip("/") + PATH


def request_fields(options: JudgeOptions) -> dict[str, Any]:
    """The fields of every request beside model and messages. Raises Refused for text that is no JSON object."""
    try:
        given = json.loads(options.request)
    except ValueError as error:
        raise Refused(f"--request: expected a JSON object: {message_line(error)}") from error
    if not isinstance(given, dict) or {"model", "messages", "stream"} & given.keys():
        raise Refused("--request: expected a JSON object without `model`, `messages` and `stream`")
    return {name: value for name, value in {**REQUEST, **given}.items() if value is not None}


def default_folder(operand: str, model: str) -> str:
    """Where verdicts lie: `judge/<model>` of an output, or `<FILE>.judge/<model>` beside a file. Raises Refused for S3."""
    if operand.startswith("s3://"):
        raise Refused("--to: expected a local folder: verdicts are appended one by one, and S3 cannot append")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip(".-") or "model"
    top = f"{operand}.judge" if operand.endswith(".jsonl") else os.path.join(operand, "judge")
    return os.path.join(os.path.expanduser(top), name)


def read_judged_answers(operand: str) -> list[JudgedAnswer]:
    """The answers of a .jsonl file or of an evaluation's output, finished or not. Raises Refused when there are none."""
    uri = storage.resolve(operand)
    try:
        if operand.endswith(".jsonl"):
            with storage.open_read(uri) as handle:
                answers = list(judge.answers_of_lines(handle, operand))
        else:
            answers = list(_answers_of_output(uri))
    except FileNotFoundError as error:
        raise Refused(f"{operand}: no such file or output") from error
    if not answers:
        raise Refused(f"{operand}: expected answers with references, got none")
    return answers


def _answers_of_output(uri: str) -> Iterator[JudgedAnswer]:
    from voco.evaluate.scores import read_answers

    if not storage.list_names(storage.join(uri, "answers")):
        raise Refused(f"{uri}: expected the output of an evaluation, with answers/, or a .jsonl file")
    table = read_answers(uri).select(["prompt", "references", "prediction", "n", "category"])
    for row in table.to_pylist():
        if row["references"]:
            yield JudgedAnswer(row["prompt"], tuple(row["references"]), row["prediction"], row["n"], row["category"])


class VerdictLog:
    """The verdicts so far, by the answer's key, and the open file that further ones are appended to."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.handle = path.open("ab+", buffering=0)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(f"{path}: another `voco judge` writes there") from error
        self.handle.seek(0)
        complete = 0
        for line in self.handle.read().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # cut by a kill
                break
            complete += len(line)
            row = json.loads(line)
            self.rows[row["key"]] = row
        self.handle.truncate(complete)

    def append(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        self.handle.write(json.dumps(row, ensure_ascii=True).encode() + b"\n")

    @property
    def verdicts(self) -> dict[str, Verdict | None]:
        """None: a reply without a verdict."""
        return {
            key: None if row["pred"] is None else Verdict(row["pred"] == "yes", row["score"]) for key, row in self.rows.items()
        }


def judge_identity(options: JudgeOptions) -> dict[str, Any]:
    """What verdicts depend on: those of another judge, prompt or request do not belong to the same figure."""
    return {
        "judge": options.model,
        "endpoint": urlsplit(options.endpoint).hostname,  # another port of the same host is the same judge
        "protocol": judge.PROTOCOL,
        "prompt_sha256": judge.PROMPT_SHA256,
        "request": request_fields(options),
    }


@contextmanager
def open_verdicts(folder: Path, options: JudgeOptions) -> Iterator[VerdictLog]:
    """The verdicts of a folder, new or continued. Raises Refused for those of another judge, and while another process writes."""
    folder.mkdir(parents=True, exist_ok=True)
    log = VerdictLog(folder / "verdicts.jsonl")
    with log.handle:
        path, current = folder / "judge.json", judge_identity(options)
        if path.exists():
            before = json.loads(path.read_text())
            differing = [name for name, value in current.items() if before.get(name) != value]
            if differing:
                name = differing[0]
                raise Refused(
                    f"{folder}: has verdicts with {name} {json.dumps(before.get(name))}, got {json.dumps(current[name])}; "
                    "use --to for another folder"
                )
        storage.write_json(str(path.resolve()), current)
        yield log


def judge_answers(answers: list[JudgedAnswer], options: JudgeOptions, log: VerdictLog) -> None:
    """Ask for every verdict that is missing. Raises JobFailed when more than `max_failures` answers get no reply, and when any
    did not; verdicts that arrived are kept.
    """
    keyed = list(zip(judge.answer_keys(answers), answers, strict=True))
    missing = [(key, answer) for key, answer in keyed if key not in log.rows]
    if len(missing) < len(keyed):
        print(f"{len(keyed) - len(missing):,} of {len(keyed):,} verdicts are there, {len(missing):,} to ask", file=sys.stderr)
    if missing:
        asyncio.run(_ask_all(missing, options, log, JudgeProgress(len(missing))))


@dataclass
class JudgeProgress:
    """A line every PROGRESS_S seconds."""

    total: int
    replies: int = 0
    unparsable: int = 0
    failed: int = 0
    repeated: int = 0  # requests after the first one of an answer
    reason: str = ""  # of the latest failure

    async def show(self) -> None:
        """Print until it is cancelled, also while no reply comes."""
        started = time.monotonic()
        while True:
            await asyncio.sleep(PROGRESS_S)
            print(self.line(time.monotonic() - started), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        speed = self.replies / max(seconds, 1e-9)
        left = f", {(self.total - self.replies) / speed / 60:.0f} min left" if self.replies else ""
        counts = f"{self.unparsable} unparsable, {self.failed} failed, {self.repeated} repeated requests"
        return f"judged {self.replies:,} of {self.total:,}: {counts}, {speed:.1f}/s{left}"


async def _ask_all(
    missing: list[tuple[str, JudgedAnswer]], options: JudgeOptions, log: VerdictLog, progress: JudgeProgress
) -> None:
    host = urlsplit(options.endpoint).hostname or ""
    if is_loopback(host):
        bypass_proxy(host)
    client = _Client(options, os.environ.get(API_KEY, "").strip())
    queue = iter(missing)

    async def work(session: aiohttp.ClientSession) -> None:
        for answer_key, answer in queue:
            try:
                row = await client.verdict(session, answer, progress)
            except _Failure as failure:
                progress.failed, progress.reason = progress.failed + 1, str(failure)
                if progress.failed > options.max_failures:
                    text = f"{progress.failed} answers got no reply, more than --max-failures {options.max_failures}"
                    raise JobFailed(f"{text}; the latest: {failure}; verdicts are kept, run it again") from None
                continue
            log.append({"key": answer_key, **row})
            progress.replies, progress.unparsable = progress.replies + 1, progress.unparsable + (row["pred"] is None)

    timeout = aiohttp.ClientTimeout(total=options.timeout_s)
    connector = aiohttp.TCPConnector(limit=options.parallel)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=True, connector=connector) as session:
        tasks = [asyncio.create_task(work(session)) for _ in range(min(options.parallel, len(missing)))]
        shown = asyncio.create_task(progress.show())
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (shown, *tasks):
                task.cancel()
            await asyncio.gather(shown, *tasks, return_exceptions=True)
    if progress.failed:
        raise JobFailed(f"{progress.failed} of {progress.total} answers got no reply ({progress.reason}); run it again")


class _Client:
    """Asks the endpoint for one verdict at a time, with retries."""

    def __init__(self, options: JudgeOptions, key: str) -> None:
        self.options, self.key = options, key
        self.url = completions_url(options.endpoint)
        self.host = urlsplit(options.endpoint).netloc
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.fields = {"model": options.model, **request_fields(options)}

    async def verdict(self, session: aiohttp.ClientSession, answer: JudgedAnswer, progress: JudgeProgress) -> dict[str, Any]:
        """A row of verdicts.jsonl without its key. Raises _Failure after all attempts, Refused when no request can succeed.

        A reply without a verdict is asked for once more, and then counts as unparsable.
        """
        payload = {**self.fields, "messages": judge.judge_messages(answer)}
        reason = ""
        row: dict[str, Any] | None = None
        for attempt in range(self.options.attempts):
            if attempt:
                progress.repeated += 1
            retry_after = None
            try:
                status, retry_after, body = await self._post(session, payload)
                if status == 200:
                    repeated = row is not None
                    row = verdict_row(*judge.reply_text(body))
                    if row["pred"] is not None or repeated:
                        return row
                    continue
                elif judge.refuses_all(status):
                    raise Refused(f"--endpoint: {self.host} answered {status}: {self._words(body)}")
                else:
                    reason = f"{self.host} answered {status}: {self._words(body)}"
                    if not judge.may_succeed_later(status):
                        break
            except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:  # ValueError: the body of a reply
                reason = f"{self.host}: {type(error).__name__} {self._clean(message_line(error))}".rstrip()
            if attempt + 1 < self.options.attempts:
                await asyncio.sleep(judge.wait_seconds(attempt, retry_after))
        if row is None:
            raise _Failure(reason)
        return row

    async def _post(self, session: aiohttp.ClientSession, payload: dict[str, Any]) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and body. Redirects are not followed: the key is for this host."""
        async with session.post(self.url, json=payload, headers=self.headers, allow_redirects=False) as response:
            body = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                body += chunk
                if len(body) > BODY_BYTES:
                    raise ValueError(f"a reply of more than {BODY_BYTES} bytes")
            return response.status, response.headers.get("Retry-After"), bytes(body)

    def _words(self, body: bytes) -> str:
        return self._clean(" ".join(body[:2000].decode("utf-8", "replace").split()))[:200]

    def _clean(self, text: str) -> str:
        """The text without the key, which some servers repeat."""
        return text.replace(self.key, "***") if self.key else text


def verdict_row(text: str, reported: str) -> dict[str, Any]:
    """A row of verdicts.jsonl without its key; `pred` and `score` are None for a reply without a verdict."""
    verdict = judge.parse_verdict(text)
    return {
        "pred": None if verdict is None else "yes" if verdict.right else "no",
        "score": None if verdict is None else verdict.score,
        "reply": text[: judge.REPLY_CHARACTERS],
        "model": reported,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_summary(folder: Path, answers: list[JudgedAnswer], verdicts: dict[str, Verdict | None], options: JudgeOptions) -> str:
    """Write summary.json: the figures, the judge and the dates. Returns them as lines of text."""
    keyed = list(zip(judge.answer_keys(answers), answers, strict=True))
    rows = [json.loads(line) for line in (folder / "verdicts.jsonl").read_bytes().splitlines()]
    dates = sorted(row["at"] for row in rows)
    reported = Counter(row["model"] for row in rows if row["model"])
    sizes: list[int | None] = sorted({answer.n for answer in answers}, key=lambda n: -1 if n is None else n)
    figures = []
    for n in sizes:
        of_n = [(answer.category, verdicts[key]) for key, answer in keyed if answer.n == n]
        by_category = {
            name: judge.judged_figures([verdict for category, verdict in of_n if category == name])
            for name in sorted({category for category, _ in of_n} - {""})
        }
        figures.append({"n": n, **judge.judged_figures([verdict for _, verdict in of_n]), "categories": by_category})
    summary = {
        **judge_identity(options),
        "reported_models": dict(sorted(reported.items())),
        "first_verdict": dates[0],
        "last_verdict": dates[-1],
        "figures": figures,
    }
    storage.write_json(str((folder / "summary.json").resolve()), summary)
    names = ", ".join(sorted(reported)) or "no name reported"
    head = f"judge {options.model} ({names}) at {summary['endpoint']}, {dates[0][:10]}"
    head += f" to {dates[-1][:10]}" if dates[0][:10] != dates[-1][:10] else ""
    return "\n".join([head, *map(_figure_line, figures), f"{folder / 'summary.json'}"])


def _figure_line(figure: dict[str, Any]) -> str:
    name = "" if figure["n"] is None else f"N={figure['n']}: "
    count = f"{figure['questions']:,} answers, {figure['unparsable']:,} replies without a verdict"
    if figure["accuracy"] is None:
        return f"{name}no figure: {count}"
    at_least = f" ({figure['accuracy_at_least']:.2%} when they count as no)" if figure["unparsable"] else ""
    return f"{name}accuracy {figure['accuracy']:.2%}{at_least}, score {figure['score']:.2f} of 5; {count}"
