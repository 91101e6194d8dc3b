"""A language model's verdict on a short answer: the prompt, what a reply says, and when a request is repeated. No I/O.

The protocol is that of Video-ChatGPT (arXiv 2306.05424, section 5.2), by which MSVD-QA, MSRVTT-QA and ActivityNet-QA are
published: the judge reads the question, the correct and the predicted answer, and replies with a small dictionary, `pred` yes or
no and `score` an integer from 0 to 5. Accuracy is yes / (yes + no), the score is the mean; decimals of a score are cut, as its
script does. The words of the prompt are ours. The authors ask again until a reply can be read; here such replies are counted.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from voco.errors import Refused

PROTOCOL = "Video-ChatGPT: yes or no, and a score from 0 to 5"
TOP_SCORE = 5
INSTRUCTION = (
    "You grade answers to questions. You are given a question, its correct answer and an answer that a model predicted. "
    "Decide whether the predicted answer means the same as the correct one.\n"
    "- What counts is the meaning: synonyms and paraphrases of the correct answer are a match.\n"
    "- Judge the predicted answer by the correct answer only, not by what you know yourself."
)
REQUEST = (
    "Grade this answer to a question about a video.\n\n"
    "Question: {question}\nCorrect answer: {reference}\nPredicted answer: {prediction}\n\n"
    "Reply with a verdict and a score. The verdict is yes or no. The score is an integer from 0 to 5, where 5 is the closest "
    "match in meaning. Reply with one Python dictionary that has the keys 'pred', a string, yes or no, and 'score', an integer "
    "and not a string. Write no other text and no explanation. The form of a reply: {{'pred': 'yes', 'score': 4}}"
)
PROMPT_SHA256 = hashlib.sha256(f"{INSTRUCTION}\0{REQUEST}".encode()).hexdigest()[:16]

REPLY_CHARACTERS = 20_000  # of a reply, that are searched for a verdict
_DICTIONARY = re.compile(r"\{[^{}]{1,2000}\}")
_REASONING = re.compile(r"<think>.*?</think>", re.DOTALL)  # of models that write down how they think before they answer

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
BUSY_STATUS = {408, 409, 425, 429}  # and every 5xx: the same request may succeed later
SETTINGS_STATUS = {401, 403, 404, 405}  # and every 3xx: no other request will succeed either


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer for the judge. `group` is what it is counted in: its N and its category."""

    question: str
    references: tuple[str, ...]
    prediction: str
    n: int | None = None
    category: str = ""


@dataclass(frozen=True)
class Verdict:
    """`score` is 0 to 5, decimals cut."""

    right: bool
    score: int


def judge_messages(answer: JudgedAnswer) -> list[dict[str, str]]:
    """The chat messages that ask for a verdict. Several references are alternatives."""
    reference = " or ".join(dict.fromkeys(answer.references))
    request = REQUEST.format(question=answer.question, reference=reference, prediction=answer.prediction)
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": request}]


def answer_keys(answers: Iterable[JudgedAnswer]) -> Iterator[str]:
    """A key for each answer, by content and not by order: equal answers differ by how many came before."""
    seen: Counter[str] = Counter()
    for answer in answers:
        content = json.dumps([answer.question, answer.references, answer.prediction, answer.n, answer.category])
        digest = hashlib.sha256(content.encode()).hexdigest()[:24]
        yield f"{digest}-{seen[digest]}"
        seen[digest] += 1


def parse_verdict(reply: str) -> Verdict | None:
    """The verdict of a reply, as JSON or Python, with or without text around it; None without exactly one verdict.

    Two dictionaries that differ are no verdict. Reasoning in <think> tags is not part of the reply.
    """
    text = _REASONING.sub("", reply[:REPLY_CHARACTERS])
    verdicts = {verdict for match in _DICTIONARY.finditer(text) if (verdict := _verdict(match[0])) is not None}
    return verdicts.pop() if len(verdicts) == 1 else None


def _verdict(dictionary: str) -> Verdict | None:
    value = _literal(dictionary)
    if not isinstance(value, dict):
        return None
    fields = {name.strip().lower(): item for name, item in value.items() if isinstance(name, str)}
    right, score = _yes_or_no(fields.get("pred")), _whole_score(fields.get("score"))
    return None if right is None or score is None else Verdict(right, score)


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # what either raises for other text
            continue
    return None


def _yes_or_no(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    word = value.strip(" .!'\"\n\t").lower() if isinstance(value, str) else None
    return {"yes": True, "no": False}.get(word or "")


def _whole_score(value: Any) -> int | None:
    """An integer from 0 to 5, decimals cut; also from a number in a string. None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if 0 <= number <= TOP_SCORE else None  # NaN is in no range


def reply_text(body: bytes) -> tuple[str, str]:
    """The text of a chat completion, "" where the judge said nothing, and the name of the model that says it has replied.

    Raises ValueError for a body that is no chat completion.
    """
    value = json.loads(body)
    choices = value.get("choices") if isinstance(value, dict) else None
    message = choices[0].get("message") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise ValueError("no choices[0].message in the reply")
    content = message.get("content")
    if isinstance(content, list):  # content parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else "", str(value.get("model") or "")


def may_succeed_later(status: int) -> bool:
    """True when the same request may be repeated: too many requests, a timeout, a fault of the server."""
    return status in BUSY_STATUS or status >= 500


def refuses_all(status: int) -> bool:
    """True when no other request will succeed either: a wrong key, path or model, a redirect."""
    return status in SETTINGS_STATUS or 300 <= status < 400


def wait_seconds(attempt: int, retry_after: str | None = None, now: datetime | None = None) -> float:
    """How long to wait before attempt `attempt` + 2 (attempt counts from 0): 1, 2, 4 ... s, or what the server asks for.

    `retry_after`: the header, in seconds or a date (RFC 9110, 10.2.3). Never more than LONGEST_WAIT_S.
    """
    backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt, 30))
    requested = _retry_after_seconds(retry_after.strip(), now or datetime.now(UTC)) if retry_after else None
    return backoff if requested is None else min(LONGEST_WAIT_S, max(0.0, requested))


def _retry_after_seconds(text: str, now: datetime) -> float | None:
    if re.fullmatch(r"\d{1,9}(\.\d{1,3})?", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()


def answers_of_lines(lines: Iterable[bytes], name: str) -> Iterator[JudgedAnswer]:
    """Answers of JSON lines: `prediction`, `references`, `prompt`, or Video-ChatGPT's names `pred`, `answer`, `question`.

    Raises Refused that names the first line without them.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise Refused(f"{name}:{number}: expected a JSON object on each line: {error}") from error
        if not isinstance(row, dict):
            raise Refused(f"{name}:{number}: expected a JSON object on each line, got {type(row).__name__}")
        prediction, prompt = (_first(row, keys) for keys in (("prediction", "pred"), ("prompt", "question")))
        references = _first(row, ("references", "answer"))
        listed = references if isinstance(references, list) else [references]
        for key, value in (("prediction", prediction), ("prompt", prompt), *(("references", item) for item in listed or [None])):
            if not isinstance(value, str):
                raise Refused(f"{name}:{number}: {key}: expected a string, got {type(value).__name__}")
        category = row.get("category")
        yield JudgedAnswer(prompt, tuple(listed), prediction, category=category if isinstance(category, str) else "")


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if key in row), None)


def judged_figures(verdicts: Sequence[Verdict | None]) -> dict[str, Any]:
    """Accuracy and mean score of the verdicts, and how many replies (None) had none.

    `accuracy_at_least` counts a reply without a verdict as no. A figure without a verdict is None.
    """
    judged = [verdict for verdict in verdicts if verdict is not None]
    right = sum(verdict.right for verdict in judged)
    return {
        "questions": len(verdicts),
        "yes": right,
        "no": len(judged) - right,
        "unparsable": len(verdicts) - len(judged),
        "accuracy": right / len(judged) if judged else None,
        "accuracy_at_least": right / len(verdicts) if verdicts else None,
        "score": sum(verdict.score for verdict in judged) / len(judged) if judged else None,
    }
