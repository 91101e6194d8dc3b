"""Caches on a storage URI, one safetensors file for each content and maker: made once, read by whoever asks about it again.

    <uri>/<maker>/<content>.safetensors      both hashes; the file says of itself what they were made of

A file is written whole or not at all and holds the same for every writer, so any number may write at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch

from voco.model.cache import CacheKey, VocoCache
from voco.store import storage

STATED = "voco.cache"


class CacheStore:
    """Caches that one maker made: everything of `key`, the numbers' type and the rotary embedding (`rope_parameters`)."""

    def __init__(self, uri: str, key: CacheKey, dtype: torch.dtype, rope: dict[str, Any]) -> None:
        self.key, self.dtype = key, dtype
        self.maker = key.stated(dtype, rope)
        self.folder = storage.join(storage.resolve(uri), _hash(self.maker)[:32])

    def place(self, content: str) -> str:
        """Where the cache of a content (`content_of`) lies or would lie."""
        return storage.join(self.folder, f"{content}.safetensors")

    def get(self, content: str) -> VocoCache | None:
        """The cache of a content; None when nobody has made it. Raises ValueError for a file of another maker or content, and
        for one that is damaged.
        """
        place = self.place(content)
        try:
            data = storage.read_bytes(place)
        except FileNotFoundError:
            return None
        try:
            tensors = safetensors.torch.load(data)
            size = int.from_bytes(data[:8], "little")
            stated = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][STATED])
            keys, values = tensors["keys"], tensors["values"]
            tokens, text_ids = tuple(stated["tokens"]), tuple(stated["text_ids"])
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{place}: not a whole cache ({error}); delete it, and it is made again") from error
        for name, wanted in {**self.maker, "content": content}.items():
            if stated.get(name) != wanted:
                raise ValueError(f"{place}: was made with {name} {stated.get(name)!r}, asked for {wanted!r}")
        count = sum(tokens) + len(text_ids)
        if keys.shape != values.shape or keys.shape[2] != count or keys.dtype != self.dtype:
            raise ValueError(f"{place}: {tuple(keys.shape)} {keys.dtype} are not the {count} tokens it states")
        return VocoCache(keys, values, tokens, self.key, text_ids)

    def put(self, content: str, cache: VocoCache) -> str:
        """Write a cache, and return where. Raises ValueError for one of another maker."""
        if cache.key != self.key or cache.keys.dtype != self.dtype:
            raise ValueError(f"this store holds caches of {self.key} in {self.dtype}, not of {cache.key} in {cache.keys.dtype}")
        stated = {**self.maker, "content": content, "tokens": cache.tokens, "text_ids": cache.text_ids}
        tensors = {"keys": cache.keys.contiguous().cpu(), "values": cache.values.contiguous().cpu()}
        place = self.place(content)
        storage.write_bytes(place, safetensors.torch.save(tensors, {STATED: json.dumps(stated, sort_keys=True)}))
        return place


def content_key(media: Sequence[tuple[bytes, Sequence[int]]], text_ids: Sequence[int] = (), tokens: int | None = None) -> str:
    """sha256 of what a cache is of: encoded images and videos in order, each with the numbers of its frames (none: an image);
    and text that is kept with them, which has read `tokens` of each view.
    """
    return _hash([[[hashlib.sha256(data).hexdigest(), list(frames)] for data, frames in media], list(text_ids), tokens])


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
