"""Who may attend to whom: pure functions of ids (design section 3; VoCo-LLaMA, arXiv 2406.12275, section 3.2).

Legend: B rows, Q queries, K keys. All ids are int64; `kind` holds the constants of `voco.sequence.sequence`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def may_attend(query: TokenIds, query_at: Tensor, key: TokenIds, key_at: Tensor, method: str) -> Tensor:
    """Bool of the shape that all of these broadcast to: may a query attend to a key. `_at` is the token's place in its row.

    `voco`: a prefix token sees its own view's prefix causally; a text token sees every <voco> of its sample and earlier
    text of its own conversation. Other methods: causal over the sample, conversations apart. Padding sees itself only,
    so that no row of the softmax is empty.
    """
    text_query, text_key = query.kind == TEXT, key.kind == TEXT
    own_text = text_query & text_key & (query.conversation == key.conversation)
    own_view = ~text_query & ~text_key
    reads = text_query & ~text_key
    if method == "voco":
        own_view = own_view & (query.view == key.view)
        reads = reads & (key.kind == VOCO)
    real = (query.kind != PAD) & (key.kind != PAD) & (query.sample == key.sample)
    return (real & (key_at <= query_at) & (own_text | own_view | reads)) | (key_at == query_at)


def allowed(ids: TokenIds, method: str, queries: int | None = None) -> Tensor:
    """(B, Q, K) bool: may query q attend to key k, as `sees` says. K is L; Q the last `queries` tokens (default: all)."""
    length = ids.kind.shape[1]
    first = length - (length if queries is None else queries)
    order = torch.arange(length, device=ids.kind.device)
    return may_attend(ids[:, first:, None], order[first:, None], ids[:, None, :], order, method)
