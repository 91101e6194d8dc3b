"""The whole model, top to bottom: projector, features into their slots, mask, loss; compress. `reader.py` reads and answers.

VoCo-LLaMA, arXiv 2406.12275. The language model is transformers' own. Legend: B rows, L tokens of a row, F views, V vision
slots, C feature width, W model width, S predictions, D layers, H key-value heads, E head width, M cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from voco.methods.avg_pool import group_means
from voco.methods.q_former import QFormer
from voco.model.attention.backends import NAME, check_backend
from voco.model.batch import Batch, CachedBatch, collate
from voco.model.cache import VocoCache, join_caches
from voco.model.generation import CacheReader, cached_tokens, reading_token_ids, to_dynamic_cache
from voco.model.kv_capture import compute_keys_values
from voco.model.lm_head import DistillTarget, LMHead
from voco.model.rope import ExactRotary, check_rope, sliding_window
from voco.model.vision.tower import VisionTower
from voco.sequence.anyres import Size
from voco.sequence.sequence import PAD, VOCO, Layout, build_sample


@dataclass(frozen=True)
class Projector:
    """Shape of the two-layer GELU projector of LLaVA-1.5."""

    features: int
    width: int

    def module(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.features, self.width), nn.GELU(), nn.Linear(self.width, self.width))


@dataclass(frozen=True)
class Distillation:
    """How a model learns from an uncompressed one: `teacher`, or itself under the plain mask. Held apart from its modules."""

    weight: float
    temperature: float
    teacher: VocoLlama | None = None


class VocoLlama(CacheReader):
    """A language model that reads images through <voco> tokens.

    `language_model` is a transformers causal LM of the Llama family, whose attention, rotary embedding and output head are
    replaced by ours; `tower` may be absent when features come ready.
    Raises ValueError for a rotary type or attention backend that cannot honour the mask or the cache exactly.
    """

    def __init__(
        self,
        language_model: Any,
        layout: Layout,
        feature_width: int,
        tower: VisionTower | None = None,
        tokenizer: Any = None,
        attention: str = "segments",
    ) -> None:
        super().__init__()
        check_rope(language_model.config)
        check_backend(attention)
        self.attention = attention
        self.window = sliding_window(language_model.config.to_dict())
        self.language_model = language_model
        language_model.set_attn_implementation(NAME)
        language_model.lm_head = LMHead(language_model.lm_head)
        language_model.model.rotary_emb = ExactRotary(language_model.model.rotary_emb)
        width = language_model.config.hidden_size
        self.projector = Projector(feature_width, width).module()
        # LLaVA-1.6: ends each row of an image's tiles under method none
        self.image_newline = None if layout.anyres is None else nn.Parameter(torch.randn(width) * width**-0.5)
        reads = layout.q_former_layers if layout.method == "q_former" else 0
        self.q_former = QFormer(layout.tokens, reads, feature_width) if reads else None
        self.tower = tower
        self.layout = layout
        self.tokenizer = tokenizer
        self.feature_width = feature_width
        # whose caches this model reads: hash of the weights on disk and their N; set when they are loaded
        self.compressor, self.compressor_tokens = "", layout.tokens
        self.distillation: Distillation | None = None
        self.preprocessing = tower.identity if tower is not None else ""

    # ---- one masked pass ------------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> Tensor:
        """(1, L, W): token embeddings with projected features in the vision slots."""
        embeds: Tensor = self.language_model.model.embed_tokens(batch.ids)
        features = batch.features.to(embeds.dtype)
        if len(features) == 0:
            # every rank must pass through the projector, or sharded weights and gradients wait for it forever
            idle: Tensor = self.projector(self.pool(features.new_zeros(1, self.layout.slots, self.feature_width))).sum()
            return embeds + 0.0 * (idle if self.image_newline is None else idle + self.image_newline.sum())
        vision = self.projector(self.pool(features)).flatten(0, 1)
        if batch.packing is not None:
            vision = torch.cat((vision, self.image_newline[None])).index_select(0, batch.packing)  # type: ignore[index]
        return embeds[0].index_copy(0, batch.vision_at, vision)[None]

    def pool(self, features: Tensor) -> Tensor:
        """(F, slots, C) of features (F, V, C): unchanged, or N means, or what N queries read."""
        if self.q_former is not None:
            pooled: Tensor = self.q_former(features)
            return pooled
        return group_means(features, self.layout.tokens) if self.layout.method == "avg_pool" else features

    def hidden(self, batch: Batch, method: str | None = None) -> Tensor:
        """(1, L, W): the last layer's normalised states under the mask of a method, our own by default, and its positions."""
        return self._run(self.embed(batch), self._see(batch.token_ids, method or self.layout.method), batch.position)

    def logits(self, batch: Batch) -> Tensor:
        """(1, L, vocabulary) logits of every token. For tests and display; training needs only supervised rows."""
        logits: Tensor = self.language_model.lm_head(self.hidden(batch))
        return logits

    def forward(self, batch: Batch | CachedBatch) -> Tensor | tuple[Tensor, Tensor]:
        """Sum of the cross-entropy over the batch's S predictions, fp32 scalar; the caller divides by the global count.

        For a batch with a teacher's: the sum with the distillation in it, and the sum of the divergences alone.
        """
        text = batch.text if isinstance(batch, CachedBatch) else batch
        soft = None if text.teacher is None else self._soft(text.teacher)
        states = self.hidden_cached(batch) if isinstance(batch, CachedBatch) else self.hidden(batch)
        predicting = states[0].index_select(0, text.predict_at)
        summed: Tensor | tuple[Tensor, Tensor] = self.language_model.lm_head(predicting, text.predict_id, soft)
        return summed

    @torch.no_grad()
    def _soft(self, batch: Batch) -> DistillTarget:
        """The teacher's states of its predictions. Its own head is used whole: only ours may be a shard elsewhere."""
        told = self.distillation
        assert told is not None
        teacher = told.teacher or self
        states = teacher.hidden(batch, "none")[0].index_select(0, batch.predict_at)
        head = None if told.teacher is None else told.teacher.language_model.lm_head.weight
        return DistillTarget(states, head, told.weight, told.temperature)

    def hidden_cached(self, batch: CachedBatch) -> Tensor:
        """(1, L, W): states of text that reads caches: pass 2 alone. Gradients reach this model's weights, not the caches."""
        text, caches = batch.text, batch.caches
        owner = torch.cat([torch.full((cached_tokens(cache),), index) for index, cache in enumerate(caches)])[None]
        ids = reading_token_ids(torch.ones_like(owner, dtype=torch.bool), owner, text.kind, text.sample, text.conversation)
        seen = self._see(ids, "voco", queries=text.ids.shape[1])
        keys, values = self.place(caches)
        past = to_dynamic_cache(keys[:, None], values[:, None])
        return self._run(self.language_model.model.embed_tokens(text.ids), seen, text.position, past)

    # ---- compress -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compress(self, pixels: Tensor) -> VocoCache:
        """The joined cache of the F views in `pixels` (F, S, S, 3) uint8, as the tower's `preprocess` makes them."""
        if self.tower is None:
            raise ValueError("this model has no vision tower; use compress_features")
        (cache,) = self.compress_features([list(self.tower(pixels))])
        return cache

    @torch.no_grad()
    def compress_images(self, images: Sequence[Image.Image | bytes]) -> VocoCache:
        """The joined cache of images, each cut into tiles as the tower's `tiles` does."""
        if self.tower is None:
            raise ValueError("this model has no vision tower; use compress_features")
        made = [self.tower.tiles(image) for image in images]
        features = [self.tower(pixels) for pixels, _ in made]
        (cache,) = self.compress_features([features], sizes=[[size for _, size in made]])
        return cache

    @torch.no_grad()
    def compress_features(
        self,
        samples: Sequence[Sequence[Tensor]],
        tokens: Sequence[int] | None = None,
        sizes: Sequence[Sequence[Size | None]] | None = None,
    ) -> list[VocoCache]:
        """One cache for each sample, given as its images' features: (V, C), or (T, V, C) of tiles, with the images' `sizes`.

        `tokens` is N of each view of every sample (default: the layout's). Under voco each view is compressed alone, at
        offset 0; under other methods a sample's views are one sequence. Raises ValueError for a sample without images: it has
        no cache (None in `write`).
        """
        if not all(len(sample) for sample in samples):
            raise ValueError("expected at least one image of every sample, got one with none")
        alone = self.layout.method == "voco"
        if self.layout.method != "none":  # each tile is a view, and no size matters any more
            samples = [[view for image in some for view in image.reshape(-1, *image.shape[-2:])] for some in samples]
            sizes = None
        units = [[view] for sample in samples for view in sample] if alone else [list(sample) for sample in samples]
        default = [self.layout.voco_tokens()] * max((len(sample) for sample in samples), default=0)
        counts = list(tokens) if tokens is not None else default
        per_unit = [[counts[i]] for s in samples for i in range(len(s))] if alone else [counts[: len(s)] for s in samples]
        made = self._compress_units(units, per_unit, sizes or [[None] * len(unit) for unit in units])
        if not alone:
            return made
        caches, start = [], 0
        for sample in samples:
            caches.append(join_caches(made[start : start + len(sample)]))
            start += len(sample)
        return caches

    def _compress_units(
        self, units: list[list[Tensor]], counts: list[list[int]], sizes: Sequence[Sequence[Size | None]]
    ) -> list[VocoCache]:
        store = {str(at): view for at, view in enumerate(view for unit in units for view in unit)}
        names = iter(store)
        samples = [
            build_sample("", [], [next(names) for _ in unit], None, self.layout, voco_tokens=count, sizes=images)
            for unit, count, images in zip(units, counts, sizes, strict=True)
        ]
        empty = (self.layout.vision_slots, self.feature_width)
        batch = collate(samples, store.__getitem__, empty).to(self.device, self.dtype)
        voco = self.layout.method == "voco"
        kept = torch.nonzero(batch.kind[0] == VOCO if voco else batch.kind[0] != PAD)[:, 0].to(self.device)
        seen = self._see(batch.token_ids, self.layout.method)
        self._check_window(batch.position)
        keys, values = compute_keys_values(self.language_model, self.embed(batch), batch.position, seen, kept)
        tokens = [n if voco else np.bincount(sample.view).tolist() for n, sample in zip(counts, samples, strict=True)]
        kept_of = [sum(each) for each in tokens]
        # copies: a cache must not hold on to the others that were made with it
        parts = [[one.clone() for one in torch.split(states, kept_of, dim=2)] for states in (keys, values)]
        return [VocoCache(k, v, tuple(some), self.cache_key()) for k, v, some in zip(*parts, tokens, strict=True)]
