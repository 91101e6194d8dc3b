"""Pass 2: text after caches. Rotates keys to their slots, reads prompts, generates answers (arXiv 2406.12275, section 3.2).

Legend: B samples, L tokens of a row, W model width, D layers, H key-value heads, E head width, M cached tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from voco.model.attention.dense import DensePlan
from voco.model.attention.plan import AttentionPlan, RowsPlan, plan_attention
from voco.model.attention.voco_mask import TokenIds
from voco.model.cache import CacheKey, ReadableCache, VocoCache, join_caches
from voco.model.checkpoint_layout import head_width
from voco.model.kv_capture import capture_keys_values
from voco.model.last_layer import states_of_rows
from voco.model.rope import max_positions, rotate
from voco.model.sampling import GREEDY, Answer, Sampling, collect_answers
from voco.sequence.chat_template import Turn
from voco.sequence.sequence import NONE, PAD, TEXT, VOCO, Layout, build_sample

BEGINNINGS = ("a", "What", "1", "?", "\u00e9", "[", "\n", "\n\n", " ")  # questions with different first tokens


class CacheReader(nn.Module):
    """The part of a VocoLlama that reads caches. It needs neither pixels nor features."""

    language_model: Any
    layout: Layout
    tokenizer: Any
    attention: str
    window: int | None
    compressor: str
    compressor_tokens: int
    preprocessing: str

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.language_model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.language_model.parameters()).dtype
        return dtype

    def _plan(self, ids: TokenIds, views_apart: bool, queries: int | None = None) -> AttentionPlan:
        return plan_attention(self.attention, ids, views_apart, self.device, queries)

    def _check_window(self, position: Tensor) -> None:
        if self.window is not None and int(position.max()) >= self.window:
            raise ValueError(
                f"a sample of {int(position.max()) + 1} positions is longer than the model's window of {self.window}"
            )

    def _run(
        self,
        embeds: Tensor,
        plan: AttentionPlan,
        position: Tensor,
        past: Any = None,
        rows: Tensor | None = None,
        part: RowsPlan | None = None,
    ) -> Tensor:
        """(B, L, W) normalised states of the last layer; with `rows` (M,), of the flattened (B x L), only theirs: (M, W).

        `part`, of the plan for these rows, spares the last layer the others.
        """
        self._check_window(position)
        if rows is not None:
            return states_of_rows(self.language_model.model, embeds, position, plan, rows, past, part)
        states: Tensor = self.language_model.model(
            inputs_embeds=embeds, position_ids=position, past_key_values=past, use_cache=past is not None, plan=plan
        ).last_hidden_state
        return states

    def cache_key(self) -> CacheKey:
        """The key of every cache that this model can read."""
        layout = self.layout
        return CacheKey(self.compressor, layout.method, self.compressor_tokens, layout.prefix_ids, self.preprocessing)

    def place_keys(self, caches: Sequence[ReadableCache | None]) -> tuple[Tensor, Tensor]:
        """Keys, rotated to their slots, and values of all samples' caches, one sample after the other: (D, H, M, E) each.

        None stands for a sample without views. Raises ValueError for a cache of another compressor.
        """
        cached = [cache for cache in caches if cache is not None]
        for cache in cached:
            if cache.key != self.cache_key():
                raise ValueError(f"this cache was made by {cache.key}, this model reads {self.cache_key()}")
        config, like = self.language_model.config, torch.empty(0, device=self.device, dtype=self.dtype)
        sizes = [cached_tokens(cache) for cache in cached]
        shape = (config.num_hidden_layers, config.num_key_value_heads, sum(sizes), head_width(config))
        keys, values = like.new_empty(shape), like.new_empty(shape)
        if not cached:
            return keys, values
        start = 0
        for cache, size in zip(cached, sizes, strict=True):
            cache.copy_to(keys[:, :, start : start + size], values[:, :, start : start + size])
            start += size
        slots = torch.cat([torch.arange(size, device=self.device) for size in sizes])
        cos, sin = self.language_model.model.rotary_emb(keys, self.layout.cached_from + slots[None])
        return rotate(keys, cos, sin), values

    def text_starts(self, caches: Sequence[ReadableCache | None]) -> Tensor:
        """(B,) int64: the position of the first text token after each cache."""
        sizes = [cached_tokens(cache) for cache in caches]
        return torch.tensor([size and self.layout.cached_from + size for size in sizes], device=self.device)

    @torch.no_grad()
    def decode_steps(
        self, caches: Sequence[ReadableCache | None], prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY
    ) -> Iterator[Tensor]:
        """Answers to one prompt (token ids) a sample: yields (B,) int64, the next token of each, without end.

        A prompt of a sample without views starts with BOS if the tokenizer has one. A generator, so that callers can stop,
        stream or inspect every step. Raises ValueError for a prompt that does not continue the text in its cache.
        """
        prompts = [_uncached(cache, prompt) for cache, prompt in zip(caches, prompts, strict=True)]
        last, past, real, position = self._prefill(caches, prompts)
        generators = sampling.generators(len(prompts))
        while True:
            token = sampling.choose(self.permitted(self.language_model.lm_head(last)), generators)
            yield token
            real = torch.cat((real, torch.ones_like(real[:, :1])), dim=1)
            embeds = self.language_model.model.embed_tokens(token[:, None])
            # one query sees every real key, so no backend could skip anything
            last = self._run(embeds, DensePlan(real[:, None, None]), position[:, None], past)[:, 0]
            position = position + 1

    def _prefill(
        self, caches: Sequence[ReadableCache | None], prompts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
        """States (B, W) of each prompt's last token, keys and values so far, which of them are real (B, M), and the next
        position (B,).
        """
        start, sizes = self.text_starts(caches), [cached_tokens(cache) for cache in caches]
        real = torch.arange(max(sizes))[None] < torch.tensor(sizes)[:, None]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.tensor([list(prompt) + [self.layout.pad_id] * (width - len(prompt)) for prompt in prompts])
        steps = torch.arange(width)[None]
        text = steps < lengths[:, None]
        kind, row = torch.where(text, TEXT, PAD), torch.arange(len(prompts))[:, None]
        token_ids = reading_token_ids(real, row.expand_as(real), kind, row.expand_as(ids), torch.zeros_like(ids))
        plan = self._plan(token_ids, views_apart=True, queries=width)
        past = to_dynamic_cache(*(_pad_rows(states, real.to(self.device)) for states in self.place_keys(caches)))
        ids, steps, lengths = ids.to(self.device), steps.to(self.device), lengths.to(self.device)
        # padding repeats a row's last position, so that it does not count as a longer sample
        position = start[:, None] + torch.minimum(steps, lengths[:, None] - 1)
        last_rows = torch.arange(len(prompts), device=self.device) * width + lengths - 1
        last = self._run(self.language_model.model.embed_tokens(ids), plan, position, past, last_rows)
        return last, past, torch.cat((real, text), dim=1).to(self.device), start + lengths

    @torch.no_grad()
    def keep_text(self, cache: VocoCache, ids: Sequence[int]) -> VocoCache:
        """`cache` with text after its views: the common beginning of all prompts (`shared_prompt_ids`), to be read only once.

        Such a cache can no longer be joined or read with fewer tokens. Raises ValueError when it holds text already.
        """
        if cache.text_ids or not ids:
            raise ValueError("expected a cache without text and at least one id")
        with capture_keys_values(self.language_model.model.layers, head_width(self.language_model.config)) as states:
            self._prefill([cache], [ids])
        text = [torch.stack([pair[index] for pair in states]).transpose(1, 2) for index in (0, 1)]
        pairs = zip((cache.keys, cache.values), text, strict=True)
        keys, values = (torch.cat((views.to(added), added), dim=2) for views, added in pairs)
        return replace(cache, keys=keys, values=values, text_ids=tuple(ids))

    def permitted(self, logits: Tensor) -> Tensor:
        """(B, vocabulary) fp32 logits; ids that no text contains, such as `<voco>`, get -inf."""
        forbidden = [self.layout.voco_id, self.layout.image_id, self.layout.pad_id]
        if self.layout.bos_id is not None:
            forbidden.append(self.layout.bos_id)
        logits = logits.float()
        logits[:, [token for token in forbidden if token not in self.layout.end_ids]] = -torch.inf
        if self.tokenizer is not None:
            logits[:, len(self.tokenizer) :] = -torch.inf  # rows that only round the table up
        return logits

    def choose(self, logits: Tensor) -> Tensor:
        """(B,) the likeliest permitted ids of (B, vocabulary) logits."""
        return self.permitted(logits).argmax(dim=-1)

    def stream_answers(
        self,
        caches: Sequence[ReadableCache | None],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Iterator[list[Answer]]:
        """The answers to one prompt (token ids) a sample after each new token, until all have ended.

        An answer ends with an end token, which is left out, before a stop string, or at `max_new_tokens`.
        Raises ValueError for a prompt whose answer could pass the model's last position.
        """
        positions = max_positions(self.language_model.config.to_dict())
        for cache, prompt in zip(caches, prompts, strict=True):
            start, length = int(self.text_starts([cache])), len(_uncached(cache, prompt))
            if start + length + max_new_tokens > positions:
                raise ValueError(
                    f"{start} positions of views, a prompt of {length} tokens and {max_new_tokens} new ones do not fit into "
                    f"the model's {positions} positions; read fewer frames (max_frames)"
                )
        end, others = self.layout.eos_id, self.layout.stop_ids
        answers = [Answer(self.tokenizer, end, tuple(stop), stop_ids=others) for _ in prompts]
        yield from collect_answers(self.decode_steps(caches, prompts, sampling), answers, max_new_tokens)

    def answer_ids(
        self, caches: Sequence[ReadableCache | None], prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy answers to one prompt (token ids) a sample, as ids; prompts and caches may be of any lengths.

        As `stream_answers`.
        """
        (*_, answers) = self.stream_answers(caches, prompts, max_new_tokens)
        return [answer.ids for answer in answers]

    def stream(
        self,
        cache: VocoCache | Sequence[VocoCache] | None,
        text: str | list[Turn],
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer to one question about cached views, piece by piece while it is generated.

        `cache` may be several, whose views are read in their order; `text` is the question, or turns that end with it. The
        prompt follows the checkpoint's template.
        """
        turns: list[Turn] = [{"role": "user", "text": text}] if isinstance(text, str) else text
        joined = cache if isinstance(cache, VocoCache) else join_caches(cache) if cache else None
        prompt = prompt_ids(turns, self.tokenizer, self.layout, has_views=joined is not None)
        for (answer,) in self.stream_answers([joined], [prompt], max_new_tokens, sampling, stop):
            yield answer.piece()

    def generate(
        self,
        cache: VocoCache | Sequence[VocoCache] | None,
        text: str | list[Turn],
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> str:
        """The complete answer to one question about cached views. As `stream`."""
        return "".join(self.stream(cache, text, max_new_tokens, sampling, stop)).strip()


def shared_prompt_ids(tokenizer: Any, layout: Layout) -> list[int]:
    """Ids with which every prompt about views begins, such as the system prompt's: what `keep_text` can cache."""
    prompts = [prompt_ids([{"role": "user", "text": text}], tokenizer, layout, True) for text in BEGINNINGS]
    shared = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return [ids[0] for ids in shared]


def prompt_ids(turns: list[Turn], tokenizer: Any, layout: Layout, has_views: bool) -> list[int]:
    """Token ids of turns that end with the user's, up to the start of the answer, without the views' prefix."""
    views = ["view"] if has_views else []
    sample = build_sample("", [turns], views, tokenizer, layout)
    ids: list[int] = sample.ids[sample.kinds == TEXT].tolist()
    return ids


def _uncached(cache: ReadableCache | None, prompt: Sequence[int]) -> list[int]:
    """The part of a prompt after the text in its cache."""
    cached = () if cache is None else cache.text_ids
    if tuple(prompt[: len(cached)]) != cached or len(prompt) <= len(cached):
        raise ValueError(f"the cache holds {len(cached)} tokens of text, and the prompt does not continue them")
    return list(prompt[len(cached) :])


def cached_tokens(cache: ReadableCache | None) -> int:
    """M of a cache; 0 without one."""
    return 0 if cache is None else sum(cache.tokens) + len(cache.text_ids)


def to_dynamic_cache(keys: Tensor, values: Tensor) -> DynamicCache:
    """transformers' cache of keys and values (D, B, H, M, E)."""
    past = DynamicCache()
    for layer, states in enumerate(zip(keys, values, strict=True)):
        past.update(*states, layer)
    return past


def _pad_rows(states: Tensor, real: Tensor) -> Tensor:
    """(D, B, H, longest, E) of (D, H, M, E): each sample's tokens in its own row, where `real` (B, longest) is True."""
    layers, heads, _, width = states.shape
    rows = states.new_zeros(*real.shape, layers, heads, width)
    rows[real] = states.permute(2, 0, 1, 3)
    return rows.permute(2, 0, 3, 1, 4)


def reading_token_ids(real: Tensor, owner: Tensor, kind: Tensor, sample: Tensor, conversation: Tensor) -> TokenIds:
    """Ids of [cached tokens, text], as if every cached token were a <voco> of its sample: text reads all of them.

    `real` and `owner` (B, M) say which cached tokens exist and whose they are; the others (B, L) are the text's.
    """
    cached = torch.where(real, VOCO, PAD)
    view = torch.cat((torch.zeros_like(cached), torch.full_like(kind, NONE)), dim=1)
    conversations = torch.cat((torch.full_like(cached, NONE), conversation), dim=1)
    return TokenIds(torch.cat((cached, kind), dim=1), torch.cat((owner, sample), dim=1), view, conversations)
