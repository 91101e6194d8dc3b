"""The whole model, top to bottom: projector, features into their slots, mask, loss; compress, then read and answer.

VoCo-LLaMA, arXiv 2406.12275. The language model is transformers' own. Legend: B rows, L tokens of a row, F views, V vision
slots, C feature width, W model width, S predictions, D layers, H key-value heads, E head width, M cached tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from voco.conversation import Turn
from voco.model.attention import NAME, Dense, Seen, check_backend, see
from voco.model.batch import Batch, CachedBatch, collate
from voco.model.cache import CacheKey, VocoCache, join
from voco.model.capture import head_width, keys_values
from voco.model.head import Head, Soft
from voco.model.q_former import QFormer, means
from voco.model.rope import ExactRotary, check_rope, longest, rotate, window
from voco.model.vision_tower import VisionTower
from voco.model.voco_mask import TokenIds
from voco.tokens import NONE, PAD, TEXT, VOCO, Layout, build


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


class VocoLlama(nn.Module):
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
        self.window = window(language_model.config.to_dict())
        self.language_model = language_model
        language_model.set_attn_implementation(NAME)
        language_model.lm_head = Head(language_model.lm_head)
        language_model.model.rotary_emb = ExactRotary(language_model.model.rotary_emb)
        self.projector = Projector(feature_width, language_model.config.hidden_size).module()
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

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.projector.parameters()).dtype

    # ---- one masked pass ------------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> Tensor:
        """(1, L, W): token embeddings with projected features in the vision slots."""
        embeds: Tensor = self.language_model.model.embed_tokens(batch.ids)
        features = batch.features.to(embeds.dtype)
        if len(features) == 0:
            # every rank must pass through the projector, or sharded weights and gradients wait for it forever
            idle: Tensor = self.projector(self.pool(features.new_zeros(1, self.layout.slots, self.feature_width))).sum()
            return embeds + 0.0 * idle
        vision = self.projector(self.pool(features))
        return embeds[0].index_copy(0, batch.vision_at, vision.flatten(0, 1))[None]

    def pool(self, features: Tensor) -> Tensor:
        """(F, slots, C) of features (F, V, C): unchanged, or N means, or what N queries read."""
        if self.q_former is not None:
            pooled: Tensor = self.q_former(features)
            return pooled
        return means(features, self.layout.tokens) if self.layout.method == "avg_pool" else features

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
    def _soft(self, batch: Batch) -> Soft:
        """The teacher's states of its predictions. Its own head is used whole: only ours may be a shard elsewhere."""
        told = self.distillation
        assert told is not None
        teacher = told.teacher or self
        states = teacher.hidden(batch, "none")[0].index_select(0, batch.predict_at)
        head = None if told.teacher is None else told.teacher.language_model.lm_head.weight
        return Soft(states, head, told.weight, told.temperature)

    def hidden_cached(self, batch: CachedBatch) -> Tensor:
        """(1, L, W): states of text that reads caches: pass 2 alone. Gradients reach this model's weights, not the caches."""
        text, caches = batch.text, batch.caches
        owner = torch.cat([torch.full((_size(cache),), index) for index, cache in enumerate(caches)])[None]
        ids = _ids_of_read(torch.ones_like(owner, dtype=torch.bool), owner, text.kind, text.sample, text.conversation)
        seen = self._see(ids, "voco", queries=text.ids.shape[1])
        keys, values = self.place(caches)
        past = _past(keys[:, None], values[:, None])
        return self._run(self.language_model.model.embed_tokens(text.ids), seen, text.position, past)

    def _see(self, ids: TokenIds, method: str, queries: int | None = None) -> Seen:
        return see(self.attention, ids, method, self.device, queries)

    def _run(self, embeds: Tensor, seen: Seen, position: Tensor, past: Any = None) -> Tensor:
        if self.window is not None and int(position.max()) >= self.window:
            raise ValueError(
                f"a sample of {int(position.max()) + 1} positions is longer than the model's window of {self.window}"
            )
        states: Tensor = self.language_model.model(
            inputs_embeds=embeds, position_ids=position, past_key_values=past, use_cache=past is not None, seen=seen
        ).last_hidden_state
        return states

    # ---- compress -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compress(self, pixels: Tensor) -> VocoCache:
        """The joined cache of the F views in `pixels` (F, S, S, 3) uint8, as the tower's `preprocess` makes them."""
        if self.tower is None:
            raise ValueError("this model has no vision tower; use compress_features")
        (cache,) = self.compress_features([list(self.tower(pixels))])
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
        batch = collate(samples, store.__getitem__, empty).to(self.device, self.dtype)
        voco = self.layout.method == "voco"
        kept = torch.nonzero(batch.kind[0] == VOCO if voco else batch.kind[0] != PAD)[:, 0].to(self.device)
        seen = self._see(batch.token_ids, self.layout.method)
        keys, values = keys_values(self.language_model, self.embed(batch), batch.position, seen, kept)
        tokens = [count if voco else [self.layout.prefix_length + n for n in count] for count in counts]
        sizes = [sum(some) for some in tokens]
        # copies: a cache must not hold on to the others that were made with it
        parts = [[one.clone() for one in torch.split(states, sizes, dim=2)] for states in (keys, values)]
        return [VocoCache(k, v, tuple(some), self.cache_key()) for k, v, some in zip(*parts, tokens, strict=True)]

    def cache_key(self) -> CacheKey:
        bos = () if self.layout.bos_id is None else (self.layout.bos_id,)
        return CacheKey(
            self.compressor, self.layout.method, self.compressor_tokens, bos + self.layout.separator_ids, self.preprocessing
        )

    # ---- read and answer ------------------------------------------------------------------------------------------

    def place(self, caches: Sequence[VocoCache | None]) -> tuple[Tensor, Tensor]:
        """Keys, rotated to their slots, and values of all samples' caches, one sample behind the other: (D, H, M, E) each.

        None stands for a sample without views. Raises ValueError for a cache of another maker.
        """
        found = [cache for cache in caches if cache is not None]
        for cache in found:
            if cache.key != self.cache_key():
                raise ValueError(f"this cache was made by {cache.key}, this model reads {self.cache_key()}")
        config, like = self.language_model.config, torch.empty(0, device=self.device, dtype=self.dtype)
        if not found:
            shape = (config.num_hidden_layers, config.num_key_value_heads, 0, head_width(config))
            return like.new_empty(shape), like.new_empty(shape)
        keys = torch.cat([cache.keys.to(like) for cache in found], dim=2)
        values = torch.cat([cache.values.to(like) for cache in found], dim=2)
        slots = torch.cat([torch.arange(_size(cache), device=self.device) for cache in found])
        cos, sin = self.language_model.model.rotary_emb(keys, self.layout.cached_from + slots[None])
        return rotate(keys, cos, sin), values

    def starts(self, caches: Sequence[VocoCache | None]) -> Tensor:
        """(B,) int64: the position of the first text token behind each cache."""
        sizes = [_size(cache) for cache in caches]
        return torch.tensor([size and self.layout.cached_from + size for size in sizes], device=self.device)

    @torch.no_grad()
    def read(self, caches: Sequence[VocoCache | None], prompts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Greedy answers to one prompt (token ids) a sample: yields (B,) int64, the next token of each, without end.

        A prompt of a sample without views starts with BOS if the tokenizer has one. A generator, so that callers stop,
        stream or look at every step.
        """
        start, sizes = self.starts(caches), [_size(cache) for cache in caches]
        real = torch.arange(max(sizes))[None] < torch.tensor(sizes)[:, None]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.tensor([list(prompt) + [self.layout.pad_id] * (width - len(prompt)) for prompt in prompts])
        steps = torch.arange(width)[None]
        text = steps < lengths[:, None]
        kind, row = torch.where(text, TEXT, PAD), torch.arange(len(prompts))[:, None]
        seen = self._see(_ids_of_read(real, row.expand_as(real), kind, row.expand_as(ids), torch.zeros_like(ids)), "voco", width)
        past = _past(*(_padded(states, real.to(self.device)) for states in self.place(caches)))
        ids, steps, lengths = ids.to(self.device), steps.to(self.device), lengths.to(self.device)
        states = self._run(self.language_model.model.embed_tokens(ids), seen, start[:, None] + steps, past)
        last = states[torch.arange(len(prompts), device=self.device), lengths - 1]
        shown = torch.cat((real, text), dim=1).to(self.device)
        position = start + lengths
        while True:
            token = self.choose(self.language_model.lm_head(last))
            yield token
            shown = torch.cat((shown, torch.ones_like(shown[:, :1])), dim=1)
            embeds = self.language_model.model.embed_tokens(token[:, None])
            # one query sees every real key: nothing for a backend to leave out
            last = self._run(embeds, Dense(shown[:, None, None]), position[:, None], past)[:, 0]
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
            start = int(self.starts([cache]))
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


def _size(cache: VocoCache | None) -> int:
    return 0 if cache is None else cache.keys.shape[2]


def _past(keys: Tensor, values: Tensor) -> DynamicCache:
    """transformers' cache of keys and values (D, B, H, M, E)."""
    past = DynamicCache()
    for layer, states in enumerate(zip(keys, values, strict=True)):
        past.update(*states, layer)
    return past


def _padded(states: Tensor, real: Tensor) -> Tensor:
    """(D, B, H, longest, E) of (D, H, M, E): each sample's tokens in a row of their own, where `real` (B, longest) says."""
    layers, heads, _, width = states.shape
    rows = states.new_zeros(*real.shape, layers, heads, width)
    rows[real] = states.permute(2, 0, 1, 3)
    return rows.permute(2, 0, 3, 1, 4)


def _ids_of_read(real: Tensor, owner: Tensor, kind: Tensor, sample: Tensor, conversation: Tensor) -> TokenIds:
    """Ids of [cached tokens, text]: as if every cached token were a <voco> of its sample.

    `real` and `owner` (B, M) say which cached tokens there are and whose; the others (B, L) are the text's.
    """
    cached = torch.where(real, VOCO, PAD)
    view = torch.cat((torch.zeros_like(cached), torch.full_like(kind, NONE)), dim=1)
    apart = torch.cat((torch.full_like(cached, NONE), conversation), dim=1)
    return TokenIds(torch.cat((cached, kind), dim=1), torch.cat((owner, sample), dim=1), view, apart)
