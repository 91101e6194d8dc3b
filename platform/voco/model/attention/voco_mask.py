"""Which tokens may attend to which: pure functions of ids (docs/method.md; VoCo-LLaMA, arXiv 2406.12275, section 3.2).

Legend: B rows, Q queries, K keys. All ids are int64; `kind` holds the constants of `voco.sequence.sequence`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from voco.job.tables import METHODS
from voco.sequence.sequence import PAD, TEXT, VOCO


@dataclass(frozen=True)
class TokenIds:
    """What a mask needs to know of each token, each (B, L)."""

    kind: Tensor
    sample: Tensor  # samples may share a row (packing)
    view: Tensor  # -1 for text
    conversation: Tensor  # -1 for a prefix

    def __getitem__(self, index: object) -> TokenIds:
        return TokenIds(self.kind[index], self.sample[index], self.view[index], self.conversation[index])  # type: ignore[index]

    def to(self, device: torch.device) -> TokenIds:
        return TokenIds(self.kind.to(device), self.sample.to(device), self.view.to(device), self.conversation.to(device))


def may_attend(query: TokenIds, query_index: Tensor, key: TokenIds, key_index: Tensor, views_apart: bool) -> Tensor:
    """Bool of the shape that all of these broadcast to. An index is the token's position in its row.

    With `views_apart` a prefix token sees its own view's prefix causally; a text token sees every <voco> of its sample and
    earlier text of its own conversation. Without: causal over the sample, conversations apart. Padding sees itself only, so
    that no row of the softmax is empty.
    """
    text_query, text_key = query.kind == TEXT, key.kind == TEXT
    own_text = text_query & text_key & (query.conversation == key.conversation)
    own_view = ~text_query & ~text_key
    reads = text_query & ~text_key
    if views_apart:
        own_view = own_view & (query.view == key.view)
        reads = reads & (key.kind == VOCO)
    real = (query.kind != PAD) & (key.kind != PAD) & (query.sample == key.sample)
    return (real & (key_index <= query_index) & (own_text | own_view | reads)) | (key_index == query_index)


def pair_mask(ids: TokenIds, views_apart: bool, queries: int | None = None) -> Tensor:
    """(B, Q, K) bool of `may_attend` for every pair. K is L; Q the last `queries` tokens (default: all)."""
    length = ids.kind.shape[1]
    first = length - (length if queries is None else queries)
    order = torch.arange(length, device=ids.kind.device)
    return may_attend(ids[:, first:, None], order[first:, None], ids[:, None, :], order, views_apart)


def allowed(ids: TokenIds, method: str, queries: int | None = None) -> Tensor:
    """(B, Q, K) bool: `pair_mask` under a compression method."""
    return pair_mask(ids, METHODS[method].views_apart, queries)
