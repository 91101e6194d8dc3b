"""Samples to one batch of tensors: padded on either side, several samples in a row, or all in one row; or text with caches.

Legend: B rows, L tokens of a row, F views of the batch in order, V vision slots, C feature width, S predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from voco.model.cache import VocoCache
from voco.model.voco_mask import TokenIds
from voco.tokens import NONE, PAD, TokenSample

Padding = Literal["right", "left", "pack", "fill"]


@dataclass(frozen=True)
class Batch:
    """What the model's forward takes."""

    ids: Tensor  # (B, L) int64
    kind: Tensor  # (B, L) int64
    sample: Tensor  # (B, L) int64, index into sample_ids; -1 for padding
    view: Tensor  # (B, L) int64
    conversation: Tensor  # (B, L) int64
    position: Tensor  # (B, L) int64
    features: Tensor  # (F, V, C) float, in the order in which their slots stand in the flattened rows
    predict_at: Tensor  # (S,) int64, index into the flattened (B x L) tokens
    predict_id: Tensor  # (S,) int64
    sample_ids: tuple[str, ...]

    @property
    def token_ids(self) -> TokenIds:
        return TokenIds(self.kind, self.sample, self.view, self.conversation)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in ("sample_ids", "features")}
        return replace(self, **moved, features=self.features.to(device=device, dtype=dtype))


@dataclass(frozen=True)
class CachedBatch:
    """Text of B samples, one in a row, and the cache that each reads; None for a sample without views."""

    text: Batch
    caches: tuple[VocoCache | None, ...]

    @property
    def predict_id(self) -> Tensor:
        return self.text.predict_id

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return self.text.sample_ids

    def to(self, device: torch.device | str, dtype: torch.dtype) -> CachedBatch:
        return replace(self, text=self.text.to(device, dtype))  # the model moves caches when it places them


def rows_of(lengths: Sequence[int], padding: Padding) -> list[list[int]]:
    """Which samples share a row. `fill` puts short samples beside each other up to the longest one's length."""
    if padding == "pack":
        return [list(range(len(lengths)))]
    if padding != "fill":
        return [[index] for index in range(len(lengths))]
    capacity = max(lengths)
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fitting = [row for row, room in enumerate(free) if room >= lengths[index]]
        if fitting:
            row = min(fitting, key=lambda item: free[item])
            rows[row].append(index)
            free[row] -= lengths[index]
        else:
            rows.append([index])
            free.append(capacity - lengths[index])
    return rows


def collate(
    samples: Sequence[TokenSample],
    features_of: Callable[[str], Tensor],
    empty: tuple[int, int],
    pad_id: int,
    padding: Padding = "fill",
) -> Batch:
    """Build a batch. `features_of(sha256)` gives a view's (V, C) features; `empty` is (V, C), for a batch without views."""
    rows = rows_of([len(sample) for sample in samples], padding)
    length = max(sum(len(samples[index]) for index in row) for row in rows)
    columns = {
        "ids": np.full((len(rows), length), pad_id, dtype=np.int64),
        "kinds": np.full((len(rows), length), PAD, dtype=np.int64),
        "view": np.full((len(rows), length), NONE, dtype=np.int64),
        "conversation": np.full((len(rows), length), NONE, dtype=np.int64),
        "position": np.zeros((len(rows), length), dtype=np.int64),
    }
    owner = np.full((len(rows), length), NONE, dtype=np.int64)
    predict_at, predict_id, features = [], [], []
    for row, members in enumerate(rows):
        start = length - sum(len(samples[index]) for index in members) if padding == "left" else 0
        for index in members:
            sample = samples[index]
            stop = start + len(sample)
            for name, column in columns.items():
                column[row, start:stop] = getattr(sample, name)
            owner[row, start:stop] = index
            predict_at.append(sample.predict_at + row * length + start)
            predict_id.append(sample.predict_id)
            features += [features_of(sha256) for sha256 in sample.media]
            start = stop
    return Batch(
        ids=torch.from_numpy(columns["ids"]),
        kind=torch.from_numpy(columns["kinds"]),
        sample=torch.from_numpy(owner),
        view=torch.from_numpy(columns["view"]),
        conversation=torch.from_numpy(columns["conversation"]),
        position=torch.from_numpy(columns["position"]),
        features=torch.stack(features) if features else torch.zeros(0, *empty),
        predict_at=torch.from_numpy(np.concatenate(predict_at)),
        predict_id=torch.from_numpy(np.concatenate(predict_id)),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def collate_cached(samples: Sequence[TokenSample], caches: Sequence[VocoCache | None], pad_id: int) -> CachedBatch:
    """A batch of samples that were built with `cached`, and the caches that they read."""
    none = [replace(sample, media=()) for sample in samples]  # their views are not in the rows
    text = collate(none, lambda _: torch.empty(0), (0, 0), pad_id, padding="right")
    return CachedBatch(text, tuple(caches))
