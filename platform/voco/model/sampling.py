"""How the next token is chosen, and when an answer is over. Warping is transformers' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

HALF = "\ufffd"  # what a tokenizer gives for the first bytes of a character


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token. Else it is drawn, of the `top_k` likeliest (0: all) and of the likeliest that
    hold `top_p` of the probability. Each answer draws from `seed` alone, so it does not depend on what it is answered beside.

    Raises ValueError for numbers out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"expected temperature >= 0, top_k >= 0 and top_p in (0, 1], got {self}")

    def generators(self, count: int) -> list[torch.Generator]:
        """One for each answer; on the host, so that a GPU draws what a CPU does."""
        return [torch.Generator().manual_seed(self.seed) for _ in range(count)]

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """(B,) int64 ids of (B, vocabulary) fp32 logits."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        chain: list[Any] = [TemperatureLogitsWarper(float(self.temperature))]
        chain += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        chain += [TopPLogitsWarper(float(self.top_p))] if self.top_p < 1 else []
        for warp in chain:
            logits = warp(None, logits)
        shares = logits.softmax(dim=-1).cpu()
        drawn = [torch.multinomial(row, 1, generator=each) for row, each in zip(shares, generators, strict=True)]
        return torch.cat(drawn).to(logits.device)


GREEDY = Sampling()


@dataclass
class Answer:
    """One answer while it is written: its ids, with those that completed a stop string, and how it ended."""

    tokenizer: Any
    eos_id: int
    stop: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    given: int = 0  # characters of `text` that were given out
    ended: str = ""  # "", end token, stop string or length

    @property
    def text(self) -> str:
        """Up to the first stop string."""
        whole = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        return whole[: min((at for at in map(whole.find, self.stop) if at >= 0), default=len(whole))]

    def add(self, token: int, last: bool) -> None:
        """One more token, the `last` that is allowed or not. Nothing changes any more once the answer has ended."""
        if self.ended:
            return
        if token == self.eos_id:
            self.ended = "end token"
            return
        self.ids.append(token)
        if self.stop and any(one in self.tokenizer.decode(self.ids, skip_special_tokens=True) for one in self.stop):
            self.ended = "stop string"
        elif last:
            self.ended = "length"

    def piece(self) -> str:
        """What can be shown of the text and was not yet: no half character, and no beginning of a stop string."""
        text = self.text
        sure = len(text)
        if not self.ended:
            begun = (size for one in self.stop for size in range(1, len(one)) if text.endswith(one[:size]))
            sure = min(len(text.rstrip(HALF)), len(text) - max(begun, default=0))
        new = text[self.given : sure]
        self.given = max(self.given, sure)
        return new


def collect_answers(tokens: Iterator[Tensor], answers: list[Answer], max_new_tokens: int) -> Iterator[list[Answer]]:
    """The answers after each of the `tokens` (B,) int64, until all have ended, at the latest after `max_new_tokens`."""
    for step, some in enumerate(tokens):
        for answer, token in zip(answers, some.tolist(), strict=True):
            answer.add(token, step + 1 >= max_new_tokens)
        yield answers
        if all(answer.ended for answer in answers):
            return
