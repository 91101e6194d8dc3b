"""Caches on a storage URI, one safetensors file for each content and compressor: computed once and read by later questions.

    <uri>/<compressor>/<content>.safetensors      both are hashes; the file's metadata holds what was hashed

A file is written completely or not at all, with the same content by every writer, so any number may write at once.
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

METADATA = "voco.cache"


class CacheStore:
    """Caches of one compressor: the same `key`, number type and rotary embedding (`rope_parameters`)."""

    def __init__(self, uri: str, key: CacheKey, dtype: torch.dtype, rope: dict[str, Any]) -> None:
        self.key, self.dtype = key, dtype
        self.description = key.describe(dtype, rope)
        self.folder = storage.join(storage.resolve(uri), _hash(self.description)[:32])

    def cache_uri(self, content: str) -> str:
        """The file of a content (`content_key`), whether it exists or not."""
        return storage.join(self.folder, f"{content}.safetensors")

    def get(self, content: str) -> VocoCache | None:
        """The cache of a content; None when there is none. Raises ValueError for a file of another compressor or content, and
        for a damaged file.
        """
        uri = self.cache_uri(content)
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            return None
        try:
            tensors = safetensors.torch.load(data)
            size = int.from_bytes(data[:8], "little")
            description = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][METADATA])
            keys, values = tensors["keys"], tensors["values"]
            tokens, text_ids = tuple(description["tokens"]), tuple(description["text_ids"])
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{uri}: not a complete cache ({error}); delete it, and it is made again") from error
        for name, expected in {**self.description, "content": content}.items():
            if description.get(name) != expected:
                raise ValueError(f"{uri}: was made with {name} {description.get(name)!r}, expected {expected!r}")
        count = sum(tokens) + len(text_ids)
        if keys.shape != values.shape or keys.shape[2] != count or keys.dtype != self.dtype:
            raise ValueError(f"{uri}: expected {count} tokens in {self.dtype}, got {tuple(keys.shape)} in {keys.dtype}")
        return VocoCache(keys, values, tokens, self.key, text_ids)

    def put(self, content: str, cache: VocoCache) -> str:
        """Write a cache and return its URI. Raises ValueError for a cache of another compressor."""
        if cache.key != self.key or cache.keys.dtype != self.dtype:
            raise ValueError(f"this store holds caches of {self.key} in {self.dtype}, not of {cache.key} in {cache.keys.dtype}")
        description = {**self.description, "content": content, "tokens": cache.tokens, "text_ids": cache.text_ids}
        tensors = {"keys": cache.keys.contiguous().cpu(), "values": cache.values.contiguous().cpu()}
        uri = self.cache_uri(content)
        storage.write_bytes(uri, safetensors.torch.save(tensors, {METADATA: json.dumps(description, sort_keys=True)}))
        return uri


def content_key(media: Sequence[tuple[bytes, Sequence[int]]], text_ids: Sequence[int] = (), tokens: int | None = None) -> str:
    """sha256 of a cache's content: encoded images and videos in order, each with the numbers of its frames (none: an image),
    and the text that is cached after them and has read `tokens` of each view.
    """
    return _hash([[[hashlib.sha256(data).hexdigest(), list(frames)] for data, frames in media], list(text_ids), tokens])


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
