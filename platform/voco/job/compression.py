"""The key `compression` of a job file: how an image's vision tokens reach the text, and where samples differ in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from voco.job.config import Strict, TrainedMethod
from voco.job.tables import METHODS

Count: TypeAlias = Annotated[int, Field(ge=1)]


def _tokens_form(value: Any) -> str:
    return "(list)" if isinstance(value, list) else "(number)"


# the tags are not in a job file: validation_errors.py leaves them out of a key's path
Tokens: TypeAlias = Annotated[
    Annotated[Count, Tag("(number)")] | Annotated[list[Count], Field(min_length=1), Tag("(list)")], Discriminator(_tokens_form)
]


class Compression(Strict):
    """How an image's vision tokens reach the text."""

    method: TrainedMethod
    # N: <voco> tokens per view; avg_pool: pooled vectors per view; q_former: queries. A list: each sample draws one of them
    tokens: Tokens
    # of a list: how often each N is drawn (docs/method.md, "Elastic N"); default: uniform
    draw: Literal["uniform", "geometric", "curriculum"] | None = None
    uncompressed_share: float | None = Field(default=None, gt=0, lt=1)  # of samples that are trained without compression
    q_former_layers: int | None = Field(default=None, ge=1)  # default: the checkpoint's, or 2 of a new Q-Former

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every N, ascending."""
        return (self.tokens,) if isinstance(self.tokens, int) else tuple(sorted(self.tokens))

    @property
    def most_tokens(self) -> int:
        """N of the checkpoint: the largest."""
        return self.sizes[-1]

    @property
    def rule(self) -> str:
        """`draw`, or its default."""
        return self.draw or "uniform"

    @property
    def share_whole(self) -> float:
        """`uncompressed_share`, or its default."""
        return self.uncompressed_share or 0.0

    @property
    def is_elastic(self) -> bool:
        """Whether samples differ in how they are compressed."""
        return len(self.sizes) > 1 or self.share_whole > 0

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.q_former_layers is not None and self.method != "q_former":
            raise ValueError(f"expected `q_former_layers` with method q_former only, got {self.method}")
        if len(set(self.sizes)) != len(self.sizes):
            raise ValueError(f"tokens: expected each N once, got {self.tokens}")
        if self.draw is not None and len(self.sizes) == 1:
            raise ValueError(f"draw: expected several `tokens` to draw from, got {self.tokens}")
        if not METHODS[self.method].views_apart and (not isinstance(self.tokens, int) or self.uncompressed_share is not None):
            key = "tokens" if not isinstance(self.tokens, int) else "uncompressed_share"
            raise ValueError(f"{key}: samples can differ in <voco> tokens only: expected method voco, got {self.method}")
        return self
