"""Attention under our mask, by one of four backends that give the same numbers; chosen by the job's `attention`.

`segments` runs causal squares with torch's own kernel, `varlen` is FlashAttention over unequal lengths (GPU), `flex` is
torch's FlexAttention, `dense` spells every pair out: the reference. What a backend needs to know of a batch is made once
per pass by `see` and travels through transformers' layers as the argument `seen`, so recomputed layers get the same.

Legend: B rows, Q queries, K keys of a row; H query heads, G key-value heads, E head width; T queries in all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from voco.model.attention.segments import Ints, Segment, causal_segments
from voco.model.attention.voco_mask import TokenIds, allowed, may_attend

NAME = "voco"  # under which transformers' layers find `attend`
BACKENDS = ("segments", "dense", "varlen", "flex")
FEW = 4  # calls
NEAR = 16  # squares whose sizes differ by less share a call: a kernel call costs more than their empty corners


class AttentionPlan(Protocol):
    """Who sees whom in one batch, as a backend wants it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(B, Q, H, E) of query (B, H, Q, E), key and value (B, G, K, E); rows of padding hold anything finite."""


def check_backend(name: str) -> None:
    """Raise ValueError for a name that is none of ours, and for one that cannot run on this machine."""
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} cannot honour the mask exactly; use one of {sorted(BACKENDS)}")
    if name == "varlen" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
        raise ValueError("attention 'varlen' needs an NVIDIA GPU of compute capability 8.0 or newer; use 'segments'")


def plan_attention(name: str, ids: TokenIds, method: str, device: torch.device, queries: int | None = None) -> AttentionPlan:
    """What `allowed(ids, method, queries)` says, for a backend. `ids` are on the host; the result is on `device`."""
    if name == "dense":
        return DensePlan(allowed(ids, method, queries)[:, None].to(device))
    if name == "flex":
        return FlexPlan.of(ids, method, device, queries)
    found = causal_segments(ids, method, queries)
    rows, length = ids.kind.shape
    asked = rows * (length if queries is None else queries)
    made: AttentionPlan = (
        VarlenPlan.of(found, asked, rows * length, device)
        if name == "varlen"
        else SegmentsPlan.of(found, asked, rows * length, device)
    )
    return made


def attend(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    scaling: float,
    seen: AttentionPlan | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention layers call. Raises ValueError where no `seen` came with the pass, and for what no backend
    of ours does: dropout and capped scores. A sliding window is not: `VocoLlama` keeps samples inside it.
    """
    if seen is None:
        raise ValueError("this model's attention must be told who sees whom: call the VocoLlama, not its language model")
    if unknown := [name for name in ("dropout", "softcap") if more.get(name)]:
        raise ValueError(f"attention with {unknown[0]} {more[unknown[0]]} is not supported")
    return seen.attend(query, key, value, scaling), None


AttentionInterface.register(NAME, attend)


# ---- dense ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DensePlan:
    """Every pair, with a mask."""

    mask: Tensor  # (B, 1, Q, K) bool

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (rows, heads, queries, width), shared = query.shape, query.shape[1] // key.shape[1]
        if queries == 1:  # one new token: the heads that share keys stand where queries do, and nothing is repeated
            query = query.reshape(rows, heads // shared, shared, width)
        else:
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        query, key, value, dtype = *_wide(query, key, value), query.dtype
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scale)
        return out.to(dtype).reshape(rows, heads, queries, width).transpose(1, 2)


# ---- segments ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentCall:
    """One kernel call over `count` segments. Query i sees keys 0..i (`mask` None, and as many of both), or what `mask` says."""

    count: int
    queries: int  # of each segment
    keys: int
    drop: int  # first queries of each, whose outputs are left out
    mask: Tensor | None  # (count, 1, queries, keys) bool

    def run(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(count * (queries - drop), H, E) of (count * queries, H, E) and (count * keys, G, E)."""
        query, key, value = (one.view(self.count, -1, *one.shape[1:]).transpose(1, 2) for one in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[:, :, self.drop :].transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class SegmentsPlan:
    """Causal squares of nearly the same size in one call each.

    Queries are set before a segment's own until there are as many as keys; their outputs are dropped, and being causal the
    square needs no mask. Smaller squares are filled up behind, where no query of theirs looks. Where the keys before a
    segment are more than its own, a rectangle with a mask is less work.

    States are gathered once for all calls; few stretches that lie in order are taken where they lie. (Of many, each would
    cost the backward pass a tensor of the whole row's size.)
    """

    calls: tuple[SegmentCall, ...]
    queries: Tensor | None  # (sum of count * queries,) int64, indices into the flattened (B x Q); None: all, in order
    keys: Tensor | None  # (sum of count * keys,) int64, into (B x K)
    back: Tensor | None  # (B x Q,) int64: where in the calls' outputs each query's is
    starts: tuple[tuple[int, int], ...] | None  # where each call's queries and keys lie, instead of `queries` and `keys`

    @classmethod
    def of(cls, found: Sequence[Segment], queries: int, keys: int, device: torch.device) -> SegmentsPlan:
        groups: dict[tuple[int, int], list[Segment]] = {}
        for one in found:
            q, k = len(one.queries), len(one.keys)
            size = (0, -(-k // NEAR)) if k <= 2 * q else (q.bit_length(), k.bit_length())
            groups.setdefault(size, []).append(one)
        calls, asked, given = [], [], []
        back, start = np.zeros(queries, dtype=np.int64), 0
        for (oblong, _), members in groups.items():
            k = max(len(one.keys) for one in members)
            q = max(len(one.queries) for one in members) if oblong else k
            before = [0 if oblong else len(one.keys) - len(one.queries) for one in members]
            drop = min(before)
            asked.append(np.stack([_filled(one.queries, more, q) for one, more in zip(members, before, strict=True)]).reshape(-1))
            given.append(np.stack([_filled(one.keys, 0, k) for one in members]).reshape(-1))
            for one, more in zip(members, before, strict=True):
                back[one.queries] = start + more - drop + np.arange(len(one.queries))
                start += q - drop
            calls.append(SegmentCall(len(members), q, k, drop, _oblong(members, q, k).to(device) if oblong else None))
        back_at = _index(back, start, device)
        runs = [(_run(ask), _run(give)) for ask, give in zip(asked, given, strict=True)]
        starts = tuple((one, other) for one, other in runs if one is not None and other is not None)
        if len(starts) == len(calls) <= FEW:
            return cls(tuple(calls), None, None, back_at, starts)
        every = _index(np.concatenate(asked), queries, device), _index(np.concatenate(given), keys, device)
        return cls(tuple(calls), every[0], every[1], back_at, None)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        asked, given = [one.count * one.queries for one in self.calls], [one.count * one.keys for one in self.calls]
        q, k, v = _flat(query), _flat(key), _flat(value)
        if self.starts is None:
            q, k, v = _wide(_taken(q, self.queries), _taken(k, self.keys), _taken(v, self.keys))
            parts = list(zip(torch.split(q, asked), torch.split(k, given), torch.split(v, given), strict=True))
        else:
            q, k, v = _wide(q, k, v)
            places = list(zip(self.starts, asked, given, strict=True))
            parts = [(q[one : one + a], k[other : other + g], v[other : other + g]) for (one, other), a, g in places]
        outs = [call.run(*part, scale) for call, part in zip(self.calls, parts, strict=True)]
        out = _taken(outs[0] if len(outs) == 1 else torch.cat(outs), self.back)
        return out.to(query.dtype).view(query.shape[0], -1, *out.shape[1:])


def _flat(states: Tensor) -> Tensor:
    """(B x L, H, E) of (B, H, L, E)."""
    return states.transpose(1, 2).flatten(0, 1)


def _taken(flat: Tensor, at: Tensor | None) -> Tensor:
    return flat if at is None else flat.index_select(0, at)


def _run(at: Ints) -> int | None:
    """Where indices start that are one behind the other; None when they are not."""
    return int(at[0]) if np.array_equal(at, np.arange(at[0], at[0] + len(at))) else None


def _filled(at: Ints, before: int, size: int) -> Ints:
    """Indices with others set before and behind; what stands there is never used."""
    return np.concatenate([np.maximum(at[0] - np.arange(before, 0, -1), 0), at, np.repeat(at[-1:], size - before - len(at))])


def _oblong(members: Sequence[Segment], q: int, k: int) -> Tensor:
    """(count, 1, q, k) bool; a query that fills up sees all, so that its softmax is not empty."""
    rows, columns = np.arange(q)[:, None], np.arange(k)[None, :]
    ahead = [len(one.keys) - len(one.queries) for one in members]
    masks = [(columns <= rows + more) | (rows >= len(one.queries)) for one, more in zip(members, ahead, strict=True)]
    return torch.from_numpy(np.stack(masks))[:, None]


def _index(at: Ints, whole: int, device: torch.device) -> Tensor | None:
    """On the device; None when it takes everything in order."""
    flat = at.reshape(-1)
    return None if np.array_equal(flat, np.arange(whole)) else torch.from_numpy(flat).to(device)


def _wide(*states: Tensor) -> tuple[Tensor, ...]:
    """On a CPU in fp32: torch's kernels are many times slower there in bf16, backward most of all, and less exact."""
    narrow = states[0].device.type == "cpu" and states[0].dtype in (torch.bfloat16, torch.float16)
    return tuple(one.float() for one in states) if narrow else states


# ---- varlen -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VarlenPlan:
    """FlashAttention over segments of unequal lengths, causal and aligned at the end, in one call (arXiv 2307.08691)."""

    queries: Tensor | None  # (T,) int64, as in `Call`
    keys: Tensor | None
    back: Tensor | None
    query_ends: Tensor  # (segments + 1,) int32, on the device: 0 and where each segment's queries end
    key_ends: Tensor
    longest: tuple[int, int]  # queries and keys of a segment

    @classmethod
    def of(cls, found: Sequence[Segment], queries: int, keys: int, device: torch.device) -> VarlenPlan:
        asked, given = (np.concatenate([getattr(one, name) for one in found]) for name in ("queries", "keys"))
        back = np.zeros(queries, dtype=np.int64)
        back[asked] = np.arange(len(asked))
        sizes = [[len(one.queries) for one in found], [len(one.keys) for one in found]]
        ends = [torch.tensor(np.cumsum([0, *some]), dtype=torch.int32, device=device) for some in sizes]
        return cls(
            _index(asked, queries, device),
            _index(given, keys, device),
            _index(back, len(asked), device),
            ends[0],
            ends[1],
            (max(sizes[0]), max(sizes[1])),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if query.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"attention 'varlen' runs in bf16 or fp16, not in {query.dtype}; use 'segments'")
        q, k, v = _taken(_flat(query), self.queries), _taken(_flat(key), self.keys), _taken(_flat(value), self.keys)
        out = _taken(varlen_kernel()(q, k, v, self.query_ends, self.key_ends, *self.longest, scale), self.back)
        return out.view(query.shape[0], -1, *out.shape[1:])


@cache
def varlen_kernel() -> Callable[..., Tensor]:
    """flash-attn where it is installed, else torch's own: (T, H, E) of query, key, value, ends, longest ones and scale."""
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        return lambda *args: flash_attn_varlen_func(*args[:-1], softmax_scale=args[-1], causal=True)
    from torch.nn.attention.varlen import varlen_attn

    def kernel(*args: Any) -> Tensor:
        grouped = args[0].shape[1] != args[1].shape[1]
        out: Tensor = varlen_attn(*args[:-1], scale=args[-1], window_size=(-1, 0), enable_gqa=grouped)  # type: ignore[assignment]
        return out

    return kernel


# ---- flex -------------------------------------------------------------------------------------------------------------


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


@dataclass(frozen=True)
class FlexPlan:
    """FlexAttention: compiled on a GPU, where blocks that hold no pair are skipped; step by step on a CPU."""

    blocks: BlockMask

    @classmethod
    def of(cls, ids: TokenIds, method: str, device: torch.device, queries: int | None) -> FlexPlan:
        rows, length = ids.kind.shape
        asked = length if queries is None else queries
        there = TokenIds(*(one.to(device) for one in (ids.kind, ids.sample, ids.view, ids.conversation)))

        def pair(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            at = query + (length - asked)
            return may_attend(there[row, at], at, there[row, key], key, method)

        return cls(create_block_mask(pair, rows, None, asked, length, device=device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if not query.is_cuda and query.requires_grad:
            raise ValueError("attention 'flex' has no backward pass on a CPU; use 'segments'")
        run: Callable[..., Any] = _compiled() if query.is_cuda else flex_attention  # type: ignore[assignment]
        query, key, value, dtype = *_wide(query, key, value), query.dtype
        grouped = query.shape[1] != key.shape[1]
        out: Tensor = run(query, key, value, block_mask=self.blocks, scale=scale, enable_gqa=grouped)
        return out.to(dtype).transpose(1, 2)
