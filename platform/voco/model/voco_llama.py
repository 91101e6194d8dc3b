"""The model: projector, features in their slots, mask, loss, compression. `generation.py` reads caches and answers.

VoCo-LLaMA, arXiv 2406.12275. The language model is transformers' own. Legend: B rows, L tokens of a row, F views, V vision
slots, C feature width, W model width, S predictions, D layers, H key-value heads, E head width, M cached tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from voco.job.config import Lora
from voco.methods import get_method
from voco.model.attention.plan import NAME, RowsPlanner, check_backend
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
    """How a model learns from an uncompressed one: `teacher`, or itself under the plain mask. Not one of its modules.

    Where ZeRO-3 has sharded the teacher, `states` computes its states for a batch's predictions, and `head` is its output head.
    """

    weight: float
    temperature: float
    teacher: VocoLlama | None = None
    states: Callable[[Batch], Tensor] | None = None
    head: Tensor | None = None


@dataclass(frozen=True)
class DetachedTower:
    """A frozen tower that runs in every forward pass and is not one of the model's modules: no optimizer, shard or checkpoint of
    training has its weights.
    """

    tower: VisionTower


class VocoLlama(CacheReader):
    """A language model that reads images through <voco> tokens.

    `language_model` is a transformers causal LM of the Llama family, whose attention, rotary embedding and output head are
    replaced by ours; without a `tower` the model takes features only.
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
        # LLaVA-1.6: ends each row of an image's tiles where text sees them all
        self.image_newline = None if layout.anyres is None else nn.Parameter(torch.randn(width) * width**-0.5)
        if hasattr(self, layout.method):
            raise ValueError(f"method {layout.method}: a part of the model has this name; use another one")
        module = get_method(layout.method).module(layout, feature_width)
        if module is not None:
            self.add_module(layout.method, module)  # saved as `<method>.*`
        self.tower = tower
        self.layout = layout
        self.tokenizer = tokenizer
        self.feature_width = feature_width
        # of the caches that this model reads: hash of the weights on disk and their N; set when they are loaded
        self.compressor, self.compressor_tokens = "", layout.tokens
        self.lora: Lora | None = None  # of the adapter that is attached, and (W,) the row of <voco> that learns beside it
        self.voco_embedding: nn.Parameter | None = None
        self.distillation: Distillation | None = None
        self.detached_tower: DetachedTower | None = None
        self.preprocessing = tower.identity if tower is not None and tower.has_weights else ""

    @property
    def method_module(self) -> nn.Module | None:
        """The weights of the compression method, if it has any."""
        return self._modules.get(self.layout.method)

    # ---- one masked pass ------------------------------------------------------------------------------------------

    def detach_tower(self) -> DetachedTower:
        """Take the tower out of the model's modules; it encodes batches of pixels from now on."""
        if self.tower is None:
            raise ValueError("this model has no vision tower")
        self.detached_tower, self.tower = DetachedTower(self.tower), None
        return self.detached_tower

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(F, V, C) fp16 features of (F, P, P, 3) uint8 pixels, by the model's tower or the one that was detached from it."""
        tower = self.tower if self.detached_tower is None else self.detached_tower.tower
        if tower is None:
            raise ValueError("this model has no vision tower; use features")
        features: Tensor = tower(pixels)
        return features

    def embed(self, batch: Batch) -> Tensor:
        """(1, L, W): token embeddings with projected features in the vision slots."""
        embeds: Tensor = self.language_model.model.embed_tokens(batch.ids)
        if self.voco_embedding is not None:  # in every batch, as the projector below
            embeds = torch.where((batch.ids == self.layout.voco_id)[..., None], self.voco_embedding, embeds)
        features = batch.encoded(self.encode_pixels).features.to(embeds.dtype)
        if len(features) == 0:
            # every rank must use the projector, or sharded weights and gradients wait for it forever
            blank = features.new_zeros(1, self.layout.vision_slots, self.feature_width)
            idle: Tensor = self.projector(self.pool(blank)).sum()
            return embeds + 0.0 * (idle if self.image_newline is None else idle + self.image_newline.sum())
        vision = self.projector(self.pool(features)).flatten(0, 1)
        if batch.packing is not None:
            vision = torch.cat((vision, self.image_newline[None])).index_select(0, batch.packing)  # type: ignore[index]
        return embeds[0].index_copy(0, batch.vision_at, vision)[None]

    def pool(self, features: Tensor) -> Tensor:
        """(F, slots, C) of features (F, V, C), as the method pools them."""
        return get_method(self.layout.method).pool(features, self.layout, self.method_module)

    def hidden(self, batch: Batch, views_apart: bool | None = None, rows: Tensor | None = None) -> Tensor:
        """(1, L, W): the last layer's normalised states at the batch's positions, by default under the method's own mask.

        With `rows` (M,) int64 only the states of those positions, (M, W).
        """
        apart = self.layout.rule.views_apart if views_apart is None else views_apart
        plan = self._plan(batch.token_ids, apart)
        part = None
        if rows is not None and isinstance(plan, RowsPlanner):
            part = plan.for_rows(batch.predict_rows if rows is batch.predict_at else rows.cpu())  # the first without a wait
        return self._run(self.embed(batch), plan, batch.position, rows=rows, part=part)

    def logits(self, batch: Batch) -> Tensor:
        """(1, L, vocabulary) logits of every token. For tests and display; training needs only supervised rows."""
        logits: Tensor = self.language_model.lm_head(self.hidden(batch))
        return logits

    def forward(self, batch: Batch | CachedBatch) -> Tensor | tuple[Tensor, Tensor]:
        """Sum of the cross-entropy over the batch's S predictions, fp32 scalar; the caller divides by the global count.

        For a batch with a teacher's: the sum that includes the distillation, and the sum of the divergences alone.
        """
        batch = batch if isinstance(batch, CachedBatch) else batch.encoded(self.encode_pixels)  # once, for the teacher too
        text = batch.text if isinstance(batch, CachedBatch) else batch
        soft = None if text.teacher is None else self._distill_target(text.teacher)
        rows = text.predict_at
        states = self.hidden_cached(batch, rows) if isinstance(batch, CachedBatch) else self.hidden(batch, rows=rows)
        summed: Tensor | tuple[Tensor, Tensor] = self.language_model.lm_head(states, text.predict_id, soft)
        return summed

    @torch.no_grad()
    def _distill_target(self, batch: Batch) -> DistillTarget:
        """The teacher's states for its predictions, and its head; None stands for ours, which ZeRO-3 may have sharded here."""
        distillation = self.distillation
        assert distillation is not None
        teacher, head = distillation.teacher, distillation.head
        if distillation.states is not None:
            states = distillation.states(batch)
        else:
            states = (teacher or self).hidden(batch, views_apart=False, rows=batch.predict_at)
            head = None if teacher is None else teacher.language_model.lm_head.weight
        return DistillTarget(states, head, distillation.weight, distillation.temperature)

    def hidden_cached(self, batch: CachedBatch, rows: Tensor | None = None) -> Tensor:
        """(1, L, W): states of text that reads caches: pass 2 alone. Gradients reach this model's weights, not the caches.

        With `rows` (M,) int64 only the states of those positions, (M, W).
        """
        text, caches = batch.text, batch.caches
        owner = torch.cat([torch.full((cached_tokens(cache),), index) for index, cache in enumerate(caches)])[None]
        ids = reading_token_ids(torch.ones_like(owner, dtype=torch.bool), owner, text.kind, text.sample, text.conversation)
        plan = self._plan(ids, views_apart=True, queries=text.ids.shape[1])
        keys, values = self.place_keys(caches)
        past = to_dynamic_cache(keys[:, None], values[:, None])
        return self._run(self.language_model.model.embed_tokens(text.ids), plan, text.position, past, rows)

    # ---- compress -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compress(self, pixels: Tensor) -> VocoCache:
        """The joined cache of the F views in `pixels` (F, S, S, 3) uint8, as the tower's `preprocess` makes them."""
        (cache,) = self.compress_features([list(self.encode_pixels(pixels))])
        return cache

    @torch.no_grad()
    def compress_images(self, images: Sequence[Image.Image | bytes]) -> VocoCache:
        """The joined cache of images, each cut into tiles as the tower's `tiles` does."""
        if self.tower is None:
            raise ValueError("this model has no vision tower; use compress_features")
        tiles = [self.tower.tiles(image) for image in images]
        features = [self.tower(pixels) for pixels, _ in tiles]
        (cache,) = self.compress_features([features], sizes=[[size for _, size in tiles]])
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
        no cache (None in `stream_answers`).
        """
        if not all(len(sample) for sample in samples):
            raise ValueError("expected at least one image of every sample, got a sample without images")
        alone = self.layout.rule.views_apart
        if not self.layout.rule.uncompressed:  # each tile is a view, and sizes no longer matter
            samples = [[view for image in images for view in image.reshape(-1, *image.shape[-2:])] for images in samples]
            sizes = None
        units = [[view] for sample in samples for view in sample] if alone else [list(sample) for sample in samples]
        default = [self.layout.voco_tokens()] * max((len(sample) for sample in samples), default=0)
        counts = list(tokens) if tokens is not None else default
        per_unit = [[counts[view]] for sample in samples for view in range(len(sample))]
        if not alone:
            per_unit = [counts[: len(sample)] for sample in samples]
        caches = self._compress_units(units, per_unit, sizes or [[None] * len(unit) for unit in units])
        if not alone:
            return caches
        joined, start = [], 0
        for sample in samples:
            joined.append(join_caches(caches[start : start + len(sample)]))
            start += len(sample)
        return joined

    def _compress_units(
        self, units: list[list[Tensor]], counts: list[list[int]], sizes: Sequence[Sequence[Size | None]]
    ) -> list[VocoCache]:
        """A cache for each unit of views that are compressed as one sequence, all in one flat row."""
        store = {str(number): view for number, view in enumerate(view for unit in units for view in unit)}
        names = iter(store)
        samples = [
            build_sample("", [], [next(names) for _ in unit], None, self.layout, voco_tokens=count, sizes=image_sizes)
            for unit, count, image_sizes in zip(units, counts, sizes, strict=True)
        ]
        empty = (self.layout.vision_slots, self.feature_width)
        batch = collate(samples, store.__getitem__, empty).to(self.device, self.dtype)
        apart, kind = self.layout.rule.views_apart, batch.kind[0]
        rows = torch.nonzero(kind == VOCO if apart else kind != PAD)[:, 0].to(self.device)
        plan = self._plan(batch.token_ids, apart)
        self._check_window(batch.position)
        keys, values = compute_keys_values(self.language_model, self.embed(batch), batch.position, plan, rows)
        tokens = [count if apart else np.bincount(sample.view).tolist() for count, sample in zip(counts, samples, strict=True)]
        lengths = [sum(view_tokens) for view_tokens in tokens]
        # copies: a cache must not keep the other units' memory alive
        parts = [[unit.clone() for unit in torch.split(states, lengths, dim=2)] for states in (keys, values)]
        return [VocoCache(k, v, tuple(per_view), self.cache_key()) for k, v, per_view in zip(*parts, tokens, strict=True)]
