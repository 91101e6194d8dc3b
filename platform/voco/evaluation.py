"""The block of an evaluate job: what is asked, and how the checkpoint is read that answers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from voco.blocks import Strict


class FastV(Strict):
    """FastV (arXiv 2403.06764): behind layer K a question goes on with the vision tokens that its last token attends to most."""

    layer: int = Field(ge=1)  # K: so many layers see every token
    keep: float = Field(gt=0, le=1)  # share of the vision tokens that go on, the paper's 1 - R


class Evaluate(Strict):
    """Answers to evaluation rows by the cached path, and their scores."""

    benchmark: str
    read_as: Literal["own", "voco", "fastv"] = "own"  # of a `none` checkpoint: voco its lower bound, fastv without training
    fastv: FastV | None = None
    # every N' <= N of a `voco` checkpoint that is asked, from one compression; default: its own N
    tokens: list[Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)
    frames: Literal["all", "shuffled", "one"] = "all"  # of a video: in order, in a drawn order, or the middle one only
    max_frames: int = Field(default=4096, ge=1)  # of one video; more are dropped evenly
    max_new_tokens: int = Field(default=8, ge=1)
    batch: int = Field(default=256, ge=1)  # questions of one forward pass
    unit_samples: int = Field(default=500, ge=1)
    resamples: int = Field(default=1000, ge=100)  # of the bootstrap

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.read_as == "fastv") != (self.fastv is not None):
            raise ValueError("fastv: expected {layer: K, keep: share} with `read_as: fastv`, and only with it")
        if self.tokens is not None and self.read_as != "own":
            raise ValueError(f"tokens: expected `read_as: own`, got {self.read_as}")
        if self.tokens is not None and len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"tokens: expected each N once, got {self.tokens}")
        return self
