"""The block `evaluate` of a job file: how a checkpoint is read, and which rule marks its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from voco.job.config import MAX_FRAMES, MetricName, Strict


class FastV(Strict):
    """FastV (arXiv 2403.06764): after layer K a question keeps the vision tokens that its last token attends to most."""

    layer: int = Field(ge=1)  # K: the first K layers see every token
    keep: float = Field(gt=0, le=1)  # share of the vision tokens that are kept, the paper's 1 - R


def _answered_form(value: Any) -> str:
    return "(list)" if isinstance(value, list) else "(word)"


# the tags are not in a job file: validation_errors.py leaves them out of a key's path
_Listed: TypeAlias = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), Tag("(list)")]
_Word: TypeAlias = Annotated[Literal["auto"] | None, Tag("(word)")]
AnsweredTokens: TypeAlias = Annotated[_Listed | _Word, Discriminator(_answered_form)]


class Evaluate(Strict):
    """Answers to evaluation rows by the cached path, and their scores."""

    benchmark: str
    metric: MetricName | None = None  # the rule that marks an answer; default: the benchmark's (job/benchmarks.py), else gqa
    # of a checkpoint of method none: voco is its lower bound, fastv drops tokens without training; of one of method voco: none
    # reads every vision token
    read_as: Literal["own", "voco", "fastv", "none"] = "own"
    fastv: FastV | None = None
    # every N' <= N at which a `voco` checkpoint answers, from one compression; default: its own N. auto: each question at the
    # smallest N' first and at larger ones while the model is unsure, so that it reads `budget` tokens of a view on average
    tokens: AnsweredTokens = None
    budget: float | None = Field(default=None, ge=1)
    frames: Literal["all", "shuffled", "one"] = "all"  # of a video: in order, in a random order, or the middle one only
    max_frames: int = Field(default=MAX_FRAMES, ge=1)  # of one video; more are dropped evenly
    limit: int | None = Field(default=None, ge=1)  # samples: only the first so many; for a first look, not for a score
    max_new_tokens: int = Field(default=8, ge=1)
    batch: int = Field(default=256, ge=1)  # questions of one forward pass
    unit_samples: int = Field(default=500, ge=1)
    resamples: int = Field(default=1000, ge=100)  # of the bootstrap

    @property
    def is_adaptive(self) -> bool:
        """Whether N depends on the question."""
        return self.tokens == "auto"

    @property
    def fixed_tokens(self) -> list[int]:
        """Every N' at which all questions are answered; empty: the checkpoint's own N, or adaptive."""
        return self.tokens if isinstance(self.tokens, list) else []

    @model_validator(mode="after")
    def _check_reading(self) -> Self:
        if (self.read_as == "fastv") != (self.fastv is not None):
            raise ValueError("fastv: expected {layer: K, keep: share} with `read_as: fastv`, and only with it")
        if self.tokens is not None and self.read_as != "own":
            raise ValueError(f"tokens: expected `read_as: own`, got {self.read_as}")
        if len(set(self.fixed_tokens)) != len(self.fixed_tokens):
            raise ValueError(f"tokens: expected each N once, got {self.tokens}")
        if self.is_adaptive != (self.budget is not None):
            raise ValueError("budget: expected a number of tokens with `tokens: auto`, and only with it")
        return self
