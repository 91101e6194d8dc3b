"""The judge's prompt, what its replies say, and when a request is repeated."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from voco.errors import Refused
from voco.evaluate import judge
from voco.evaluate.judge import JudgedAnswer, Verdict

VERDICTS: list[tuple[str, Verdict | None]] = [
    ("{'pred': 'yes', 'score': 5}", Verdict(True, 5)),
    ('{"pred": "no", "score": 0}', Verdict(False, 0)),
    ("{'pred': 'yes', 'score': 4.8}", Verdict(True, 4)),  # the script of the protocol takes int(score)
    ("{'pred': 'yes', 'score': '4'}", Verdict(True, 4)),
    ("{'pred': 'Yes.', 'score': 3}", Verdict(True, 3)),
    ("{'pred': ' NO ', 'score': 1}", Verdict(False, 1)),
    ('{"Pred": "no", "Score": 2}', Verdict(False, 2)),
    ('{"pred": true, "score": 5}', Verdict(True, 5)),
    ('```json\n{"pred": "no", "score": 2}\n```', Verdict(False, 2)),
    ("Verdict: {'pred': 'no',\n 'score': 0}. The answers differ.", Verdict(False, 0)),
    ("{'pred': 'yes', 'score': 5} {'pred': 'yes', 'score': 5}", Verdict(True, 5)),
    ("<think>{'pred': 'yes', 'score': 5}?</think>{'pred': 'no', 'score': 1}", Verdict(False, 1)),
    ("{'pred': 'yes', 'score': 5, 'why': 'a dog is a dog'}", Verdict(True, 5)),
    ("{'answer': 3} {'pred': 'yes', 'score': 4}", Verdict(True, 4)),
    ("{'pred': 'yes', 'score': 5} or {'pred': 'no', 'score': 1}", None),
    ("{'pred': 'yes', 'score': 6}", None),
    ("{'pred': 'yes', 'score': -1}", None),
    ("{'pred': 'yes', 'score': NaN}", None),
    ("{'pred': 'yes', 'score': 1e999}", None),
    ("{'pred': 'yes', 'score': True}", None),
    ("{'pred': 'yes', 'score': '4/5'}", None),
    ("{'pred': 'yes', 'score': None}", None),
    ("{'pred': 'maybe', 'score': 3}", None),
    ("{'pred': 'yes and no', 'score': 3}", None),
    ("{'pred': 'yes'}", None),
    ("{'score': 5}", None),
    ("yes, 5", None),
    ("", None),
    ("{}", None),
    ("{'pred': 'yes', 'score': 5", None),
    ("['yes', 5]", None),
    ("{['pred']: 1, 'score': 2}", None),
    ("{__import__('os').system('false'): 1}", None),
    ("{" * 50_000, None),
    ("{" + "[" * 1900 + "}", None),
]


@pytest.mark.parametrize(("reply", "verdict"), VERDICTS, ids=[reply[:40] for reply, _ in VERDICTS])
def test_verdicts_of_replies(reply: str, verdict: Verdict | None) -> None:
    assert judge.parse_verdict(reply) == verdict


def test_the_form_that_the_prompt_shows_is_a_verdict() -> None:
    system, user = judge.judge_messages(JudgedAnswer("who runs {fast}?", ("a man", "man", "man"), "a {boy}"))
    assert (system["role"], user["role"]) == ("system", "user")
    for part in ("Question: who runs {fast}?\n", "Correct answer: a man or man\n", "Predicted answer: a {boy}\n"):
        assert part in user["content"]
    assert judge.parse_verdict(user["content"]) == Verdict(True, 4)


def test_figures_count_replies_without_a_verdict() -> None:
    verdicts = [Verdict(True, 5), Verdict(True, 4), Verdict(False, 0), None]
    assert judge.judged_figures(verdicts) == {
        "questions": 4, "yes": 2, "no": 1, "unparsable": 1, "accuracy": 2 / 3, "accuracy_at_least": 0.5, "score": 3.0,
    }  # fmt: skip
    nothing = judge.judged_figures([None])
    assert (nothing["accuracy"], nothing["score"], nothing["accuracy_at_least"]) == (None, None, 0.0)


def test_equal_answers_have_different_keys_that_do_not_depend_on_others() -> None:
    first, second = JudgedAnswer("q", ("a",), "p"), JudgedAnswer("q", ("a",), "other")
    keys = list(judge.answer_keys([first, second, first]))
    assert len(set(keys)) == 3
    assert set(judge.answer_keys([second, first])) == set(keys[:2])


NOW = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("attempt", "header", "seconds"),
    [
        (0, None, 1), (1, None, 2), (5, None, 32), (9, None, 60), (10**6, None, 60), (0, "7", 7), (3, "0", 0), (0, "0.25", 0.25),
        (0, "3600", 60), (0, " 5 ", 5), (0, "Thu, 02 Jan 2025 03:04:35 GMT", 30), (0, "Thu, 02 Jan 2025 03:04:00 GMT", 0),
        (1, "soon", 2), (0, "-4", 1), (0, "9" * 400, 1), (0, "", 1),
    ],
)  # fmt: skip
def test_waits_are_those_of_the_server_and_limited(attempt: int, header: str | None, seconds: float) -> None:
    assert judge.wait_seconds(attempt, header, NOW) == pytest.approx(seconds)


def test_which_requests_are_repeated() -> None:
    later = {status for status in range(200, 600) if judge.may_succeed_later(status)}
    never = {status for status in range(200, 600) if judge.refuses_all(status)}
    assert later == {408, 409, 425, 429, *range(500, 600)}
    assert never == {*range(300, 400), 401, 403, 404, 405}


@pytest.mark.parametrize(
    ("body", "text", "model"),
    [
        (b'{"model": "m-1", "choices": [{"message": {"content": "hi"}}]}', "hi", "m-1"),
        (b'{"choices": [{"message": {"content": null, "refusal": "no"}}]}', "", ""),
        (b'{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": null}, {"text": "b"}]}}]}', "ab", ""),
    ],
)
def test_text_of_a_chat_completion(body: bytes, text: str, model: str) -> None:
    assert judge.reply_text(body) == (text, model)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"text": "a"}]}', b"\xff\xfe{"]
)
def test_other_bodies_are_no_chat_completion(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"no choices|JSON|Expecting|decode"):
        judge.reply_text(body)


def test_lines_in_both_namings() -> None:
    lines = [
        b'{"prompt": "q", "references": ["a", "b"], "prediction": "p", "category": "color"}\n', b"\n",
        b'{"id": "1", "question": "q2", "answer": "a2", "pred": ""}\n',
    ]  # fmt: skip
    expected = [JudgedAnswer("q", ("a", "b"), "p", category="color"), JudgedAnswer("q2", ("a2",), "")]
    assert list(judge.answers_of_lines(lines, "f")) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "f:2: expected a JSON object"),
        (b"[1]", "f:2: expected a JSON object on each line, got list"),
        (b'{"prompt": "q", "references": ["a"]}', "f:2: prediction: expected a string, got NoneType"),
        (b'{"prompt": "q", "references": [], "prediction": "p"}', "f:2: references: expected a string, got NoneType"),
        (b'{"prompt": "q", "references": [1], "prediction": "p"}', "f:2: references: expected a string, got int"),
        (b'{"references": ["a"], "prediction": "p"}', "f:2: prompt: expected a string"),
        (b"\xff\xfe", "f:2: expected a JSON object"),
    ],
)
def test_a_line_that_cannot_be_judged_is_named(line: bytes, message: str) -> None:
    with pytest.raises(Refused, match=message):
        list(judge.answers_of_lines([b'{"question": "q", "answer": "a", "pred": "p"}', line], "f"))
