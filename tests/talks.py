"""Conversations about several views each, for tests of a tiny model: as one masked pass, and as text that reads caches."""

from __future__ import annotations

from typing import Any

import tiny
import torch

from voco.model.batch import Batch, collate, collate_cached
from voco.model.cache import VocoCache
from voco.model.voco_llama import VocoLlama
from voco.sequence.sequence import build_sample

TALKS = [
    [[tiny.question("which way does it move?", "left")], 3],
    [[tiny.question("how often?", "twice"), tiny.question("what comes first?", "the circle")], 5],
    [[tiny.question("say hello", "hello")], 0],
    [[tiny.question("one frame?", "yes"), tiny.question("why?", "so"), tiny.question("and?", "no")], 1],
]


def talking_samples(model: VocoLlama) -> tuple[list[Any], dict[str, torch.Tensor], list[list[torch.Tensor]]]:
    """Samples as (conversations, view names), features by name, features by sample."""
    features = tiny.features(sum(count for _, count in TALKS))
    store = {str(number): view for number, view in enumerate(features)}
    names, samples = iter(store), []
    for talks, count in TALKS:
        samples.append((talks, [next(names) for _ in range(count)]))
    return samples, store, [[store[name] for name in views] for _, views in samples]


def one_pass(model: VocoLlama, samples: list[Any], store: dict[str, torch.Tensor]) -> Batch:
    built = [build_sample("s", talks, views, tiny.TOKENIZER, model.layout) for talks, views in samples]
    return collate(built, store.__getitem__, (tiny.VISION_SLOTS, tiny.FEATURES))


def cached(model: VocoLlama, samples: list[Any], caches: list[VocoCache | None]) -> Any:
    built = [build_sample("s", talks, views, tiny.TOKENIZER, model.layout, cached=True) for talks, views in samples]
    return collate_cached(built, caches)


def caches_of(model: VocoLlama, by_sample: list[list[torch.Tensor]]) -> list[VocoCache | None]:
    return [model.compress_features([views])[0] if views else None for views in by_sample]
