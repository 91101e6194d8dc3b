"""The whole model, top to bottom: projector, features into their slots, mask, loss; compress, then read and answer.

VoCo-LLaMA, arXiv 2406.12275. The language model is transformers' own. Legend: B rows, L tokens, F views, V vision slots,
C feature width, W model width, S predictions, D layers, H key-value heads, E head width, M cached tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from voco.conversation import Turn
from voco.model.batch import Batch, CachedBatch, collate
from voco.model.cache import CacheKey, VocoCache, join
from voco.model.capture import capture
from voco.model.rope import ExactRotary, check_rope, longest, rotate
from voco.model.vision_tower import VisionTower
from voco.model.voco_mask import TokenIds, allowed
from voco.tokens import NONE, PAD, TEXT, VISION, VOCO, Layout, build

BACKENDS = {"sdpa", "eager"}  # attention that honours any boolean mask exactly


@dataclass(frozen=True)
class Projector:
    """Shape of the two-layer GELU projector of LLaVA-1.5."""

    features: int
    width: int

    def module(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.features, self.width), nn.GELU(), nn.Linear(self.width, self.width))


class VocoLlama(nn.Module):
    """A language model that reads images through <voco> tokens.

    `language_model` is a transformers causal LM of the Llama family; `tower` may be absent when features come ready.
    Raises ValueError for a rotary type or attention backend that cannot honour the mask or the cache exactly.
    """

    def __init__(
        self, language_model: Any, layout: Layout, feature_width: int, tower: VisionTower | None = None, tokenizer: Any = None
    ) -> None:
        super().__init__()
        check_rope(language_model.config)
        check_backend(language_model.config._attn_implementation)
        self.language_model = language_model
        language_model.model.rotary_emb = ExactRotary(language_model.model.rotary_emb)
        self.projector = Projector(feature_width, language_model.config.hidden_size).module()
        self.tower = tower
        self.layout = layout
        self.tokenizer = tokenizer
        self.feature_width = feature_width
        # whose caches this model reads: hash of the weights on disk and their N; set when they are loaded
        self.compressor, self.compressor_tokens = "", layout.tokens
        self.preprocessing = tower.identity if tower is not None else ""

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.projector.parameters()).dtype

    # ---- one masked pass ------------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> Tensor:
        """(B, L, W): token embeddings with projected features in the vision slots."""
        embeds: Tensor = self.language_model.model.embed_tokens(batch.ids)
        features = batch.features.to(embeds.dtype)
        if len(features) == 0:
            # every rank must pass through the projector, or sharded weights and gradients wait for it forever
            idle: Tensor = self.projector(features.new_zeros(1, 1, self.feature_width)).sum()
            return embeds + 0.0 * idle
        vision = self.projector(pool(features, self.layout))
        filled: Tensor = embeds.masked_scatter((batch.kind == VISION)[:, :, None], vision)
        return filled

    def hidden(self, batch: Batch) -> Tensor:
        """(B, L, W): the last layer's normalised states under our own mask and positions."""
        mask = allowed(batch.token_ids, self.layout.method)[:, None]
        return self._run(self.embed(batch), mask, batch.position)

    def logits(self, batch: Batch) -> Tensor:
        """(B, L, vocabulary) logits of every token. For tests and display; training needs only supervised rows."""
        logits: Tensor = self.language_model.lm_head(self.hidden(batch))
        return logits

    def forward(self, batch: Batch | CachedBatch) -> Tensor:
        """Sum of the cross-entropy over the batch's S predictions, fp32 scalar; the caller divides by the global count."""
        if isinstance(batch, CachedBatch):
            states, text = self.hidden_cached(batch), batch.text
        else:
            states, text = self.hidden(batch), batch
        logits = self.language_model.lm_head(states.flatten(0, 1)[text.predict_at])
        return F.cross_entropy(logits.float(), text.predict_id, reduction="sum")

    def hidden_cached(self, batch: CachedBatch) -> Tensor:
        """(B, L, W): states of text that reads caches: pass 2 alone. Gradients reach this model's weights, not the caches."""
        past, real, _ = self.past(batch.caches)
        text = batch.text
        mask = allowed(_ids_of_read(real, text.kind == TEXT, text.conversation), "voco", queries=text.ids.shape[1])
        return self._run(self.language_model.model.embed_tokens(text.ids), mask[:, None], text.position, past)

    def _run(self, embeds: Tensor, mask: Tensor, position: Tensor, past: Any = None) -> Tensor:
        if self.language_model.config._attn_implementation == "eager":  # wants an additive mask
            mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)
        states: Tensor = self.language_model.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=past, use_cache=past is not None
        ).last_hidden_state
        return states

    # ---- compress -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compress(self, pixels: Tensor) -> VocoCache:
        """The joined cache of the F views in `pixels` (F, 3, size, size), as the tower's `preprocess` makes them."""
        if self.tower is None:
            raise ValueError("this model has no vision tower; use compress_features")
        (cache,) = self.compress_features([list(self.tower(pixels.to(self.device)))])
        return cache

    @torch.no_grad()
    def compress_features(self, samples: Sequence[Sequence[Tensor]], tokens: Sequence[int] | None = None) -> list[VocoCache]:
        """One cache for each sample, given as its views' (V, C) features.

        `tokens` is N of each view of every sample (default: the layout's). Under voco each view is compressed alone, at
        offset 0; under other methods a sample's views are one sequence.
        """
        alone = self.layout.method == "voco"
        units = [[view] for sample in samples for view in sample] if alone else [list(sample) for sample in samples]
        default = [self.layout.voco_tokens()] * max((len(sample) for sample in samples), default=0)
        counts = list(tokens) if tokens is not None else default
        per_unit = [[counts[i]] for s in samples for i in range(len(s))] if alone else [counts[: len(s)] for s in samples]
        made = self._compress_units(units, per_unit)
        if not alone:
            return made
        caches, start = [], 0
        for sample in samples:
            caches.append(join(made[start : start + len(sample)]))
            start += len(sample)
        return caches

    def _compress_units(self, units: list[list[Tensor]], counts: list[list[int]]) -> list[VocoCache]:
        store = {str(at): view for at, view in enumerate(view for unit in units for view in unit)}
        names = iter(store)
        samples = [
            build("", [], [next(names) for _ in unit], None, self.layout, voco_tokens=count)
            for unit, count in zip(units, counts, strict=True)
        ]
        empty = (self.layout.vision_slots, self.feature_width)
        batch = collate(samples, store.__getitem__, empty, self.layout.pad_id, padding="right").to(self.device, self.dtype)
        kept = batch.kind == VOCO if self.layout.method == "voco" else batch.kind != PAD
        with capture(self.language_model) as states:
            self.hidden(batch)
        key = self.cache_key()
        caches = []
        for row, count in enumerate(counts):
            keys = torch.stack([k[row, kept[row]].transpose(0, 1) for k, _ in states])
            values = torch.stack([v[row, kept[row]].transpose(0, 1) for _, v in states])
            rows = count if self.layout.method == "voco" else [self.layout.prefix_length + n for n in count]
            caches.append(VocoCache(keys, values, tuple(rows), key))
        return caches

    def cache_key(self) -> CacheKey:
        bos = () if self.layout.bos_id is None else (self.layout.bos_id,)
        return CacheKey(
            self.compressor, self.layout.method, self.compressor_tokens, bos + self.layout.separator_ids, self.preprocessing
        )

    # ---- read and answer ------------------------------------------------------------------------------------------

    def past(self, caches: Sequence[VocoCache | None]) -> tuple[DynamicCache, Tensor, Tensor]:
        """Caches of B samples placed at their slots: transformers' cache, (B, M) which rows are real, (B,) next position.

        None stands for a sample without views. Raises ValueError for a cache of another maker.
        """
        for cache in caches:
            if cache is not None and cache.key != self.cache_key():
                raise ValueError(f"this cache was made by {cache.key}, this model reads {self.cache_key()}")
        sizes = [0 if cache is None else cache.keys.shape[2] for cache in caches]
        longest = max(sizes)
        config = self.language_model.config
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = torch.zeros(len(caches), config.num_hidden_layers, heads, longest, width, device=self.device, dtype=self.dtype)
        values = torch.zeros_like(keys)
        for row, cache in enumerate(caches):
            if cache is not None:
                keys[row, :, :, : sizes[row]] = cache.keys.to(keys)
                values[row, :, :, : sizes[row]] = cache.values.to(values)
        real = torch.arange(longest, device=self.device)[None] < torch.tensor(sizes, device=self.device)[:, None]
        position = self.layout.cached_from + torch.arange(longest, device=self.device)[None]
        cos, sin = self.language_model.model.rotary_emb(keys, position)
        keys = rotate(keys, cos[:, None, None], sin[:, None, None])
        past = DynamicCache()
        for layer in range(config.num_hidden_layers):
            past.update(keys[:, layer], values[:, layer], layer)
        starts = [0 if not size else self.layout.cached_from + size for size in sizes]
        return past, real, torch.tensor(starts, device=self.device)

    @torch.no_grad()
    def read(self, caches: Sequence[VocoCache | None], prompts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Greedy answers to one prompt (token ids) a sample: yields (B,) int64, the next token of each, without end.

        A prompt of a sample without views starts with BOS if the tokenizer has one. A generator, so that callers stop,
        stream or look at every step.
        """
        past, real, start = self.past(caches)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = int(lengths.max())
        padded = [list(prompt) + [self.layout.pad_id] * (width - len(prompt)) for prompt in prompts]
        ids = torch.tensor(padded, device=self.device)
        steps = torch.arange(width, device=self.device)[None]
        text = steps < lengths[:, None]
        mask = allowed(_ids_of_read(real, text, torch.zeros_like(ids)), "voco", queries=width)
        states = self._run(self.language_model.model.embed_tokens(ids), mask[:, None], start[:, None] + steps, past)
        last = states[torch.arange(len(prompts), device=self.device), lengths - 1]
        seen = torch.cat((real, text), dim=1)
        position = start + lengths
        while True:
            token = self.choose(self.language_model.lm_head(last))
            yield token
            seen = torch.cat((seen, torch.ones_like(seen[:, :1])), dim=1)
            embeds = self.language_model.model.embed_tokens(token[:, None])
            last = self._run(embeds, seen[:, None, None], position[:, None], past)[:, 0]
            position = position + 1

    def choose(self, logits: Tensor) -> Tensor:
        """(B,) the likeliest ids of (B, vocabulary) logits; an id that no text holds is never chosen."""
        forbidden = [self.layout.voco_id, self.layout.image_id, self.layout.pad_id]
        if self.layout.bos_id is not None and self.layout.bos_id != self.layout.eos_id:
            forbidden.append(self.layout.bos_id)
        logits = logits.float()
        logits[:, [one for one in forbidden if one != self.layout.eos_id]] = -torch.inf
        if self.tokenizer is not None:
            logits[:, len(self.tokenizer) :] = -torch.inf  # rows that only round the table up
        return logits.argmax(dim=-1)

    @torch.no_grad()
    def answer(
        self, caches: Sequence[VocoCache | None], prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """New token ids for each prompt, up to its end token, which is left out.

        Raises ValueError for a prompt whose answer could pass the model's last position.
        """
        most = longest(self.language_model.config.to_dict())
        for cache, prompt in zip(caches, prompts, strict=True):
            start = 0 if cache is None else self.layout.cached_from + cache.keys.shape[2]
            if start + len(prompt) + max_new_tokens > most:
                raise ValueError(
                    f"{start} positions of views, a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit into "
                    f"the model's {most} positions; read fewer frames (max_frames)"
                )
        answers: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for step, token in enumerate(self.read(caches, prompts)):
            for row, one in enumerate(token.tolist()):
                if row in open_rows and one == self.layout.eos_id:
                    open_rows.discard(row)
                elif row in open_rows:
                    answers[row].append(one)
            if not open_rows or step + 1 >= max_new_tokens:
                break
        return answers

    def generate(self, cache: VocoCache | None, text: str, max_new_tokens: int = 64) -> str:
        """The answer to one question about the cached views. The prompt follows the checkpoint's template."""
        turns: list[Turn] = [{"role": "user", "text": text}]
        prompt = prompt_ids(turns, self.tokenizer, self.layout, has_views=cache is not None)
        (ids,) = self.answer([cache], [prompt], max_new_tokens)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def prompt_ids(turns: list[Turn], tokenizer: Any, layout: Layout, has_views: bool) -> list[int]:
    """Token ids of turns that end with the user's, up to where the answer starts; the views' prefix is not part of it."""
    views = ["view"] if has_views else []
    sample = build("", [turns], views, tokenizer, layout)
    ids: list[int] = sample.ids[sample.kinds == TEXT].tolist()
    return ids


def check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} cannot honour the mask exactly; use one of {sorted(BACKENDS)}")


def pool(features: Tensor, layout: Layout) -> Tensor:
    """(F, slots, C) of (F, V, C): unchanged, or under avg_pool the means of N equal groups in raster order."""
    if layout.method != "avg_pool":
        return features
    if features.shape[1] % layout.tokens:
        raise ValueError(f"avg_pool: {features.shape[1]} positions do not fall into {layout.tokens} equal groups")
    return features.reshape(len(features), layout.tokens, -1, features.shape[2]).mean(dim=2)


def _ids_of_read(real: Tensor, text: Tensor, conversation: Tensor) -> TokenIds:
    """Ids of [cached tokens, text]: as if every cached token were a <voco> of the sample. All (B, M) or (B, L)."""
    cached = torch.where(real, VOCO, PAD)
    kind = torch.cat((cached, torch.where(text, TEXT, PAD)), dim=1)
    view = torch.cat((torch.zeros_like(cached), torch.full_like(text, NONE, dtype=torch.int64)), dim=1)
    return TokenIds(kind, torch.zeros_like(kind), view, torch.cat((torch.full_like(cached, NONE), conversation), dim=1))
