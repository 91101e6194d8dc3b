"""Samples to one batch of tensors: all in one flat row without padding, or their text in such a row beside their caches.

Legend: L tokens of the row, F views of the batch in order, V vision slots, C feature width, S predictions, P side of the tower's
square in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voco.model.attention.voco_mask import TokenIds
from voco.model.cache import ReadableCache
from voco.sequence.anyres import NEWLINE
from voco.sequence.sequence import TEXT, VISION, VOCO, TokenSample

DEVICE_COLUMNS = ("ids", "position", "vision_at", "predict_at", "predict_id")  # of a batch


@dataclass(frozen=True)
class Batch:
    """The input of the model's forward. Attention is planned on the host, so the ids that it needs stay there."""

    ids: Tensor  # (1, L) int64
    position: Tensor  # (1, L) int64
    features: Tensor  # (F, V, C) float, in the order of their slots in the row
    vision_at: Tensor  # (vision slots,) int64, index of each in the row
    predict_at: Tensor  # (S,) int64, index of the token whose output predicts
    predict_id: Tensor  # (S,) int64
    predict_rows: Tensor  # (S,) int64, predict_at again, on the host as the next four
    kind: Tensor  # (1, L) int64
    sample: Tensor  # (1, L) int64, index into sample_ids
    view: Tensor  # (1, L) int64
    conversation: Tensor  # (1, L) int64
    sample_ids: tuple[str, ...]
    # (vision slots,) int64: the index of each slot among the F * V projected features, F * V for a newline; None: all, in order
    packing: Tensor | None = None
    teacher: Batch | None = None  # the same predictions in the teacher's layout, over the same features
    pixels: Tensor | None = None  # (F, P, P, 3) uint8, from which the model's frozen tower computes `features`, empty until then

    @property
    def token_ids(self) -> TokenIds:
        return TokenIds(self.kind, self.sample, self.view, self.conversation)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """The batch on a device, its features in `dtype`, pixels as bytes. The ids for the attention plan stay on the host.

        Features travel in their stored type. Copies of a `pinned` batch overlap with the device's work.
        """
        target = torch.device(device)
        overlaps = target.type != "cpu"

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(target, non_blocking=overlaps)

        columns: dict[str, Any] = {name: moved(getattr(self, name)) for name in (*DEVICE_COLUMNS, "packing", "pixels")}
        features = self.features.to(target, non_blocking=overlaps).to(dtype)
        teacher = None if self.teacher is None else replace(self.teacher, features=features, pixels=None).to(target, dtype)
        return replace(self, **columns, features=features, teacher=teacher)

    def pinned(self) -> Batch:
        """The batch with all that goes to a device in page-locked memory. Needs CUDA."""
        columns = {name: getattr(self, name) for name in (*DEVICE_COLUMNS, "packing", "pixels", "features")}
        locked: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in columns.items() if tensor is not None}
        if self.teacher is None:
            return replace(self, **locked)
        empty = replace(self.teacher, features=self.features[:0], pixels=None).pinned()
        return replace(self, **locked, teacher=replace(empty, features=locked["features"]))

    def encoded(self, tower: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with the features that `tower` computes in place of its pixels; its teacher's batch gets the same ones."""
        if self.pixels is None:
            return self
        features = tower(self.pixels)
        teacher = None if self.teacher is None else replace(self.teacher, features=features)
        return replace(self, features=features, teacher=teacher, pixels=None)


@dataclass(frozen=True)
class CachedBatch:
    """Text of several samples, and the cache that each reads; None for a sample without views."""

    text: Batch
    caches: tuple[ReadableCache | None, ...]

    @property
    def predict_id(self) -> Tensor:
        return self.text.predict_id

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return self.text.sample_ids

    def to(self, device: torch.device | str, dtype: torch.dtype) -> CachedBatch:
        return replace(self, text=self.text.to(device, dtype))  # the model moves caches when it reads them

    def pinned(self) -> CachedBatch:
        """The batch with its text in page-locked memory. Needs CUDA."""
        return replace(self, text=self.text.pinned())


def collate(samples: Sequence[TokenSample], features_of: Callable[[str], Tensor], empty: tuple[int, int]) -> Batch:
    """Build a batch. `features_of(sha256)` gives an image's features, (V, C) or (T, V, C) of its tiles; `empty` is (V, C).

    Instead of the features of every image it may give the pixels of every image, (T, P, P, 3) uint8.
    Raises ValueError for an image with another number of tiles than the sample was built for.
    """
    starts = np.cumsum([0, *(len(sample) for sample in samples)])[:-1]

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(sample, name) for sample in samples]))

    kind, view, views, tiles = joined("kinds"), joined("view"), list[Tensor](), list[int]()
    vision_at = torch.nonzero(kind == VISION)[:, 0]
    whole = torch.from_numpy(np.repeat([sample.whole for sample in samples], [len(sample) for sample in samples]))
    if whole.any():  # to the mask, one view of <voco> tokens alone: causal, and text reads all of it
        in_prefix = whole & (kind != TEXT)
        kind, view = torch.where(in_prefix, VOCO, kind), torch.where(in_prefix, 0, view)
    for sample in samples:
        images = [image[None] if image.dim() == 2 else image for image in map(features_of, sample.media)]
        tiles.append(sum(len(image) for image in images))
        if sample.tiles is not None and sample.tiles != tiles[-1]:
            raise ValueError(f"sample {sample.sample_id}: expected features of {sample.tiles} tiles, got {tiles[-1]}")
        views += images
    as_pixels = bool(views) and views[0].dtype == torch.uint8
    predict_at = torch.from_numpy(np.concatenate([s.predict_at + start for s, start in zip(samples, starts, strict=True)]))
    return Batch(
        ids=joined("ids")[None],
        position=joined("position")[None],
        features=torch.cat(views) if views and not as_pixels else torch.zeros(0, *empty),
        pixels=torch.cat(views) if as_pixels else None,
        vision_at=vision_at,
        predict_at=predict_at,
        predict_rows=predict_at,
        predict_id=joined("predict_id"),
        kind=kind[None],
        sample=torch.from_numpy(np.repeat(np.arange(len(samples)), [len(sample) for sample in samples]))[None],
        view=view[None],
        conversation=joined("conversation")[None],
        sample_ids=tuple(sample.sample_id for sample in samples),
        packing=_packing(samples, tiles, empty[0] if as_pixels or not views else views[0].shape[1]),
    )


def _packing(samples: Sequence[TokenSample], tiles: Sequence[int], slots: int) -> Tensor | None:
    """The samples' packings as one, over the rows of the batch's features; a newline is the row after them."""
    if all(sample.packing is None for sample in samples):
        return None
    parts, start, end = [], 0, sum(tiles) * slots
    for sample, count in zip(samples, tiles, strict=True):
        own = np.arange(count * slots) if sample.packing is None else sample.packing
        parts.append(np.where(own == NEWLINE, end, own + start))
        start += count * slots
    return torch.from_numpy(np.concatenate(parts))


def with_teacher(student: Batch, teacher: Batch) -> Batch:
    """The student's batch with its teacher's. Raises ValueError unless both predict the same ids in order."""
    if not torch.equal(student.predict_id, teacher.predict_id):
        raise ValueError(f"teacher and student do not predict the same tokens in samples {', '.join(student.sample_ids)}")
    return replace(student, teacher=replace(teacher, features=student.features, pixels=None))


def collate_cached(samples: Sequence[TokenSample], caches: Sequence[ReadableCache | None]) -> CachedBatch:
    """A batch of samples that were built with `cached`, and the caches that they read."""
    text = [replace(sample, media=(), tiles=None) for sample in samples]  # their views are not in the row
    return CachedBatch(collate(text, lambda _: torch.empty(0), (0, 0)), tuple(caches))
