"""Pass 2: text behind caches. Places keys at their slots, reads prompts, writes answers (arXiv 2406.12275, section 3.2).

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

from voco.model.attention.backends import AttentionPlan, DensePlan, plan_attention
from voco.model.attention.voco_mask import TokenIds
from voco.model.cache import CacheKey, VocoCache, join_caches
from voco.model.kv_capture import capture_keys_values, head_width
from voco.model.rope import max_positions, rotate
from voco.model.sampling import GREEDY, Answer, Sampling, collect_answers
from voco.sequence.chat_template import Turn
from voco.sequence.sequence import NONE, PAD, TEXT, VOCO, Layout, build_sample

BEGINNINGS = ("a", "What", "1", "?", "\u00e9", "[", "\n", "\n\n", " ")  # questions of which no two begin alike


class CacheReader(nn.Module):
    """What of a VocoLlama reads caches: it knows nothing of pixels and features."""

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

    def _see(self, ids: TokenIds, method: str, queries: int | None = None) -> AttentionPlan:
        return plan_attention(self.attention, ids, method, self.device, queries)

    def _check_window(self, position: Tensor) -> None:
        if self.window is not None and int(position.max()) >= self.window:
            raise ValueError(
                f"a sample of {int(position.max()) + 1} positions is longer than the model's window of {self.window}"
            )

    def _run(self, embeds: Tensor, seen: AttentionPlan, position: Tensor, past: Any = None) -> Tensor:
        self._check_window(position)
        states: Tensor = self.language_model.model(
            inputs_embeds=embeds, position_ids=position, past_key_values=past, use_cache=past is not None, seen=seen
        ).last_hidden_state
        return states

    def cache_key(self) -> CacheKey:
        bos = () if self.layout.bos_id is None else (self.layout.bos_id,)
        return CacheKey(
            self.compressor, self.layout.method, self.compressor_tokens, bos + self.layout.separator_ids, self.preprocessing
        )

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
        slots = torch.cat([torch.arange(cached_tokens(cache), device=self.device) for cache in found])
        cos, sin = self.language_model.model.rotary_emb(keys, self.layout.cached_from + slots[None])
        return rotate(keys, cos, sin), values

    def starts(self, caches: Sequence[VocoCache | None]) -> Tensor:
        """(B,) int64: the position of the first text token behind each cache."""
        sizes = [cached_tokens(cache) for cache in caches]
        return torch.tensor([size and self.layout.cached_from + size for size in sizes], device=self.device)

    @torch.no_grad()
    def read(
        self, caches: Sequence[VocoCache | None], prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY
    ) -> Iterator[Tensor]:
        """Answers to one prompt (token ids) a sample: yields (B,) int64, the next token of each, without end.

        A prompt of a sample without views starts with BOS if the tokenizer has one. A generator, so that callers stop,
        stream or look at every step. Raises ValueError for a prompt that does not go on from the text its cache holds.
        """
        prompts = [_rest(cache, prompt) for cache, prompt in zip(caches, prompts, strict=True)]
        last, past, shown, position = self._prefill(caches, prompts)
        generators = sampling.generators(len(prompts))
        while True:
            token = sampling.choose(self.permitted(self.language_model.lm_head(last)), generators)
            yield token
            shown = torch.cat((shown, torch.ones_like(shown[:, :1])), dim=1)
            embeds = self.language_model.model.embed_tokens(token[:, None])
            # one query sees every real key: nothing for a backend to leave out
            last = self._run(embeds, DensePlan(shown[:, None, None]), position[:, None], past)[:, 0]
            position = position + 1

    def _prefill(
        self, caches: Sequence[VocoCache | None], prompts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
        """States (B, W) of each prompt's last token, keys and values so far, which of them are real (B, M), and the next
        position (B,).
        """
        start, sizes = self.starts(caches), [cached_tokens(cache) for cache in caches]
        real = torch.arange(max(sizes))[None] < torch.tensor(sizes)[:, None]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.tensor([list(prompt) + [self.layout.pad_id] * (width - len(prompt)) for prompt in prompts])
        steps = torch.arange(width)[None]
        text = steps < lengths[:, None]
        kind, row = torch.where(text, TEXT, PAD), torch.arange(len(prompts))[:, None]
        seen = self._see(
            reading_token_ids(real, row.expand_as(real), kind, row.expand_as(ids), torch.zeros_like(ids)), "voco", width
        )
        past = to_dynamic_cache(*(_padded(states, real.to(self.device)) for states in self.place(caches)))
        ids, steps, lengths = ids.to(self.device), steps.to(self.device), lengths.to(self.device)
        # a row's padding stands at its last position: it must not count as a longer sample
        position = start[:, None] + torch.minimum(steps, lengths[:, None] - 1)
        states = self._run(self.language_model.model.embed_tokens(ids), seen, position, past)
        last = states[torch.arange(len(prompts), device=self.device), lengths - 1]
        return last, past, torch.cat((real, text), dim=1).to(self.device), start + lengths

    @torch.no_grad()
    def keep_text(self, cache: VocoCache, ids: Sequence[int]) -> VocoCache:
        """`cache` with text behind its views: what every prompt begins with (`shared_ids`) need not be read again.

        Such a cache can no longer be joined or read with fewer tokens. Raises ValueError when it holds text already.
        """
        if cache.text_ids or not ids:
            raise ValueError("expected a cache without text and at least one id")
        with capture_keys_values(self.language_model.model.layers, head_width(self.language_model.config)) as states:
            self._prefill([cache], [ids])
        more = [torch.stack([pair[index] for pair in states]).transpose(1, 2) for index in (0, 1)]
        keys, values = (torch.cat((old.to(new), new), dim=2) for old, new in zip((cache.keys, cache.values), more, strict=True))
        return replace(cache, keys=keys, values=values, text_ids=tuple(ids))

    def permitted(self, logits: Tensor) -> Tensor:
        """(B, vocabulary) fp32 logits; ids that no text holds, `<voco>` among them, have none."""
        forbidden = [self.layout.voco_id, self.layout.image_id, self.layout.pad_id]
        if self.layout.bos_id is not None and self.layout.bos_id != self.layout.eos_id:
            forbidden.append(self.layout.bos_id)
        logits = logits.float()
        logits[:, [one for one in forbidden if one != self.layout.eos_id]] = -torch.inf
        if self.tokenizer is not None:
            logits[:, len(self.tokenizer) :] = -torch.inf  # rows that only round the table up
        return logits

    def choose(self, logits: Tensor) -> Tensor:
        """(B,) the likeliest permitted ids of (B, vocabulary) logits."""
        return self.permitted(logits).argmax(dim=-1)

    def write(
        self,
        caches: Sequence[VocoCache | None],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Iterator[list[Answer]]:
        """The answers to one prompt (token ids) a sample after each new token, until all have ended.

        An answer ends with the end token, which is left out, before a stop string, or at `max_new_tokens`.
        Raises ValueError for a prompt whose answer could pass the model's last position.
        """
        most = max_positions(self.language_model.config.to_dict())
        for cache, prompt in zip(caches, prompts, strict=True):
            start, length = int(self.starts([cache])), len(_rest(cache, prompt))
            if start + length + max_new_tokens > most:
                raise ValueError(
                    f"{start} positions of views, a prompt of {length} tokens and {max_new_tokens} new ones do not fit into "
                    f"the model's {most} positions; read fewer frames (max_frames)"
                )
        answers = [Answer(self.tokenizer, self.layout.eos_id, tuple(stop)) for _ in prompts]
        yield from collect_answers(self.read(caches, prompts, sampling), answers, max_new_tokens)

    def answer(
        self, caches: Sequence[VocoCache | None], prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy answers to one prompt (token ids) a sample, as ids; prompts and caches may be of any lengths. As `write`."""
        (*_, answers) = self.write(caches, prompts, max_new_tokens)
        return [answer.ids for answer in answers]

    def stream(
        self,
        cache: VocoCache | Sequence[VocoCache] | None,
        text: str | list[Turn],
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer to one question about cached views, piece by piece as it is written.

        `cache` may be several, whose views are read in their order; `text` the question, or turns that end with it. The
        prompt follows the checkpoint's template.
        """
        turns: list[Turn] = [{"role": "user", "text": text}] if isinstance(text, str) else text
        whole = join_caches(cache) if isinstance(cache, Sequence) and cache else cache if isinstance(cache, VocoCache) else None
        prompt = prompt_ids(turns, self.tokenizer, self.layout, has_views=whole is not None)
        for (answer,) in self.write([whole], [prompt], max_new_tokens, sampling, stop):
            yield answer.piece()

    def generate(
        self,
        cache: VocoCache | Sequence[VocoCache] | None,
        text: str | list[Turn],
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> str:
        """The answer to one question about cached views, whole. As `stream`."""
        return "".join(self.stream(cache, text, max_new_tokens, sampling, stop)).strip()


def shared_prompt_ids(tokenizer: Any, layout: Layout) -> list[int]:
    """Ids with which every prompt about views begins, such as the system prompt's: what `keep_text` can keep."""
    begins = [prompt_ids([{"role": "user", "text": text}], tokenizer, layout, True) for text in BEGINNINGS]
    same = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*begins, strict=False))
    return [ids[0] for ids in same]


def prompt_ids(turns: list[Turn], tokenizer: Any, layout: Layout, has_views: bool) -> list[int]:
    """Token ids of turns that end with the user's, up to where the answer starts; the views' prefix is not part of it."""
    views = ["view"] if has_views else []
    sample = build_sample("", [turns], views, tokenizer, layout)
    ids: list[int] = sample.ids[sample.kinds == TEXT].tolist()
    return ids


def _rest(cache: VocoCache | None, prompt: Sequence[int]) -> list[int]:
    """What of a prompt is still to be read."""
    held = () if cache is None else cache.text_ids
    if tuple(prompt[: len(held)]) != held or len(prompt) <= len(held):
        raise ValueError(f"the cache holds {len(held)} tokens of text, and the prompt does not go on from them")
    return list(prompt[len(held) :])


def cached_tokens(cache: VocoCache | None) -> int:
    return 0 if cache is None else cache.keys.shape[2]


def to_dynamic_cache(keys: Tensor, values: Tensor) -> DynamicCache:
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


def reading_token_ids(real: Tensor, owner: Tensor, kind: Tensor, sample: Tensor, conversation: Tensor) -> TokenIds:
    """Ids of [cached tokens, text]: as if every cached token were a <voco> of its sample.

    `real` and `owner` (B, M) say which cached tokens there are and whose; the others (B, L) are the text's.
    """
    cached = torch.where(real, VOCO, PAD)
    view = torch.cat((torch.zeros_like(cached), torch.full_like(kind, NONE)), dim=1)
    apart = torch.cat((torch.full_like(cached, NONE), conversation), dim=1)
    return TokenIds(torch.cat((cached, kind), dim=1), torch.cat((owner, sample), dim=1), view, apart)
