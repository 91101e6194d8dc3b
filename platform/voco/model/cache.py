"""Cached keys and values of a view's <voco> tokens, before rotation, so that caches can be joined and read at any slot.

Under methods whose views are not apart a cache holds the entire prefix (full-KV caching). Legend: D layers, H key-value
heads, M cached tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from voco.job.tables import METHODS


@dataclass(frozen=True)
class CacheKey:
    """What must match before a cache is read."""

    compressor: str  # hash of the weights that made it
    method: str
    n: int  # the compressor's N; a cache may hold fewer rows of each view
    prefix_ids: tuple[int, ...]  # BOS and separators, in order
    preprocessing: str  # hash of the tower and of what is done to pixels

    @property
    def views_apart(self) -> bool:
        return METHODS[self.method].views_apart

    def describe(self, dtype: torch.dtype, rope: dict[str, Any]) -> dict[str, Any]:
        """The description in cache files, ready for JSON; `rope` is the language model's `rope_parameters`.

        Keys are cached before rotation, but those of deeper layers depend on it.
        """
        key = {**asdict(self), "prefix_ids": list(self.prefix_ids)}
        return {**key, "dtype": str(dtype).removeprefix("torch."), "rope": rope}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> CacheKey:
        """The key in a description that `describe` made."""
        values = {field.name: description[field.name] for field in fields(cls)}
        return cls(**{**values, "prefix_ids": tuple(values["prefix_ids"])})


class ReadableCache(Protocol):
    """What text can read: keys and values of the cached tokens of views, in view order, not yet rotated."""

    @property
    def key(self) -> CacheKey: ...

    @property
    def tokens(self) -> tuple[int, ...]:
        """Cached tokens of each view."""

    @property
    def text_ids(self) -> tuple[int, ...]:
        """Text after the views that is cached too."""

    def take(self, n: int) -> Self:
        """The first `n` tokens of each view."""

    def copy_to(self, keys: Tensor, values: Tensor) -> None:
        """Write all keys and values into (D, H, M, E) tensors of any number type and device, which may be parts of others."""


@dataclass(frozen=True)
class VocoCache:
    """Keys and values of the cached tokens of one or more views, in view order."""

    keys: Tensor  # (D, H, M, E), after any key norm, before RoPE
    values: Tensor  # (D, H, M, E)
    tokens: tuple[int, ...]  # cached tokens of each view
    key: CacheKey
    text_ids: tuple[int, ...] = ()  # text after the views that is cached too; M counts views and text

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def copy_to(self, keys: Tensor, values: Tensor) -> None:
        """Write keys and values into tensors of the same shape and of any number type and device."""
        keys.copy_(self.keys)
        values.copy_(self.values)

    def take(self, n: int) -> VocoCache:
        """The first `n` tokens of each view: what the same model makes with n <voco>. Raises ValueError if a view has fewer."""
        if self.text_ids:
            raise ValueError("this cache holds text that has read all of its tokens; take fewer before the text is cached")
        if not self.key.views_apart or n > min(self.tokens, default=0):
            raise ValueError(f"cannot read {n} tokens of views that hold {self.tokens} under {self.key.method}")
        starts = [sum(self.tokens[:view]) for view in range(len(self.tokens))]
        rows = torch.tensor([start + token for start in starts for token in range(n)])
        return replace(self, keys=self.keys[:, :, rows], values=self.values[:, :, rows], tokens=(n,) * len(self.tokens))


def join_caches(caches: Sequence[VocoCache]) -> VocoCache:
    """One cache of all views, in order. Raises ValueError for caches of different keys, and for caches that cannot be joined."""
    first = caches[0]
    for other in caches[1:]:
        if other.key != first.key:
            raise ValueError(f"caches of different compressors cannot be joined: {first.key} and {other.key}")
    if len(caches) > 1 and any(cache.text_ids for cache in caches):
        raise ValueError(
            "a cache with text, which has read its own views only, cannot be joined; join the caches before text is cached"
        )
    if len(caches) > 1 and not first.key.views_apart:
        raise ValueError(f"under {first.key.method} views see each other, so their caches cannot be joined")
    return VocoCache(
        keys=torch.cat([cache.keys for cache in caches], dim=2),
        values=torch.cat([cache.values for cache in caches], dim=2),
        tokens=tuple(count for cache in caches for count in cache.tokens),
        key=first.key,
        text_ids=first.text_ids,
    )
