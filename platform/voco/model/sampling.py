"""How the next token is chosen, and when an answer ends. Warping is transformers' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

INCOMPLETE = "\ufffd"  # a tokenizer's text for the first bytes of a character


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token. Else the token is drawn from the `top_k` likeliest (0: all), and of these from
    the likeliest that hold `top_p` of the probability. Each answer draws from `seed` alone, whatever else is in its batch.

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
        """A generator for each answer; on the host, so that a GPU draws what a CPU does."""
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
        drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(shares, generators, strict=True)]
        return torch.cat(drawn).to(logits.device)


GREEDY = Sampling()


@dataclass(frozen=True)
class NotedMargin(Sampling):
    """The same choice; notes how sure the model is of each answer's first token."""

    margins: list[float] = field(default_factory=list)  # of each answer: the likeliest token's probability less the next one's

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        if not self.margins:
            first, second = logits.softmax(dim=-1).topk(2).values.unbind(dim=-1)
            self.margins.extend((first - second).tolist())
        return super().choose(logits, generators)


@dataclass
class Answer:
    """One answer while it is generated: its ids, with those that completed a stop string, and how it ended."""

    tokenizer: Any
    eos_id: int
    stop: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    shown: int = 0  # characters of `text` that `piece` has returned
    ended: str = ""  # "", end token, stop string or length
    stop_ids: tuple[int, ...] = ()  # further ids that end it, as `eos_id` does

    @property
    def text(self) -> str:
        """Up to the first stop string."""
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        return text[: min((index for index in map(text.find, self.stop) if index >= 0), default=len(text))]

    def add(self, token: int, last: bool) -> None:
        """Add a token; `last` says that no more may follow. Does nothing once the answer has ended."""
        if self.ended:
            return
        if token == self.eos_id or token in self.stop_ids:
            self.ended = "end token"
            return
        self.ids.append(token)
        if self.stop and any(stop in self.tokenizer.decode(self.ids, skip_special_tokens=True) for stop in self.stop):
            self.ended = "stop string"
        elif last:
            self.ended = "length"

    def piece(self) -> str:
        """The text that can be shown since the last call: no half character, and no beginning of a stop string."""
        text = self.text
        end = len(text)
        if not self.ended:
            begun = (size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size]))
            end = min(len(text.rstrip(INCOMPLETE)), len(text) - max(begun, default=0))
        piece = text[self.shown : end]
        self.shown = max(self.shown, end)
        return piece


def collect_answers(tokens: Iterator[Tensor], answers: list[Answer], max_new_tokens: int) -> Iterator[list[Answer]]:
    """The answers after each step of `tokens` (B,) int64, until all have ended, at the latest after `max_new_tokens`."""
    for step, next_ids in enumerate(tokens):
        for answer, token in zip(answers, next_ids.tolist(), strict=True):
            answer.add(token, step + 1 >= max_new_tokens)
        yield answers
        if all(answer.ended for answer in answers):
            return
