"""The reusable part: keys and values of an image's <voco> tokens, before rotation, joined and placed at any slot.

For other methods the same holds the whole prefix (full-KV caching). Legend: D layers, H key-value heads, M kept tokens,
E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheKey:
    """What must match before a cache is read: a cache under anything else is another model's."""

    compressor: str  # hash of the weights that made it
    method: str
    n: int  # the maker's N; fewer of its rows may be kept
    prefix_ids: tuple[int, ...]  # BOS and separators, in order
    preprocessing: str  # hash of the tower and of what is done to pixels

    def stated(self, dtype: torch.dtype, rope: dict[str, Any]) -> dict[str, Any]:
        """What files of caches say of their maker, ready for JSON; `rope` is the language model's `rope_parameters`.

        Keys are kept before rotation, but deeper layers have seen it.
        """
        key = {**asdict(self), "prefix_ids": list(self.prefix_ids)}
        return {**key, "dtype": str(dtype).removeprefix("torch."), "rope": rope}

    @classmethod
    def of(cls, stated: dict[str, Any]) -> CacheKey:
        """The key of a maker as `stated`."""
        held = {field.name: stated[field.name] for field in fields(cls)}
        return cls(**{**held, "prefix_ids": tuple(held["prefix_ids"])})


@dataclass(frozen=True)
class VocoCache:
    """Keys and values of the kept tokens of one or more views, in view order."""

    keys: Tensor  # (D, H, M, E), after any key norm, before RoPE
    values: Tensor  # (D, H, M, E)
    tokens: tuple[int, ...]  # kept tokens of each view
    key: CacheKey
    text_ids: tuple[int, ...] = ()  # text that was read behind the views and is kept too; M is all of these

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def take(self, n: int) -> VocoCache:
        """The first `n` tokens of each view: what the same model makes with n <voco> tokens. Raises ValueError for more."""
        if self.text_ids:
            raise ValueError("this cache holds text that has read all of its tokens; take fewer before the text is kept")
        if self.key.method != "voco" or n > min(self.tokens, default=0):
            raise ValueError(f"cannot read {n} tokens of views that hold {self.tokens} under {self.key.method}")
        starts = [sum(self.tokens[:index]) for index in range(len(self.tokens))]
        rows = torch.tensor([start + at for start in starts for at in range(n)])
        return replace(self, keys=self.keys[:, :, rows], values=self.values[:, :, rows], tokens=(n,) * len(self.tokens))


def join_caches(caches: Sequence[VocoCache]) -> VocoCache:
    """One cache of all views, in order. Raises ValueError when they were made under different keys, or cannot be joined."""
    first = caches[0]
    for other in caches[1:]:
        if other.key != first.key:
            raise ValueError(f"caches of different makers cannot be joined: {first.key} and {other.key}")
    if len(caches) > 1 and any(cache.text_ids for cache in caches):
        raise ValueError("a cache that holds text, which has read its own views only, cannot be joined; join before it is kept")
    if len(caches) > 1 and first.key.method != "voco":
        raise ValueError(f"under {first.key.method} views see each other, so their caches cannot be joined")
    return VocoCache(
        keys=torch.cat([cache.keys for cache in caches], dim=2),
        values=torch.cat([cache.values for cache in caches], dim=2),
        tokens=tuple(count for cache in caches for count in cache.tokens),
        key=first.key,
        text_ids=first.text_ids,
    )
