"""Who may attend to whom: pure functions of ids (design section 3; VoCo-LLaMA, arXiv 2406.12275, section 3.2).

Legend: B rows, Q queries, K keys. All ids are int64; `kind` holds the constants of `voco.tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from voco.tokens import PAD, TEXT, VOCO


@dataclass(frozen=True)
class TokenIds:
    """What a mask needs to know of each token, each (B, L)."""

    kind: Tensor
    sample: Tensor  # samples may share a row (packing)
    view: Tensor  # -1 for text
    conversation: Tensor  # -1 for a prefix

    def __getitem__(self, index: object) -> TokenIds:
        return TokenIds(self.kind[index], self.sample[index], self.view[index], self.conversation[index])  # type: ignore[index]


def allowed(ids: TokenIds, method: str, queries: int | None = None) -> Tensor:
    """(B, Q, K) bool: may query q attend to key k. K is L; Q the last `queries` tokens (default: all).

    `voco`: a prefix token sees its own view's prefix causally; a text token sees every <voco> of its sample and earlier
    text of its own conversation. Other methods: causal over the sample, conversations apart. Padding sees itself only,
    so that no row of the softmax is empty.
    """
    length = ids.kind.shape[1]
    first = length - (length if queries is None else queries)
    order = torch.arange(length, device=ids.kind.device)
    query, key = ids[:, first:], ids

    def same(name: str) -> Tensor:
        mine: Tensor = getattr(query, name)
        other: Tensor = getattr(key, name)
        return mine[:, :, None] == other[:, None, :]

    causal = order[None, None, :] <= order[None, first:, None]
    text_query = (query.kind == TEXT)[:, :, None]
    text_key = (key.kind == TEXT)[:, None, :]
    own_text = text_query & text_key & same("conversation")
    if method == "voco":
        own_view = ~text_query & ~text_key & same("view")
        reads = text_query & (key.kind == VOCO)[:, None, :]
    else:
        own_view = ~text_query & ~text_key
        reads = text_query & ~text_key
    real = ((query.kind != PAD)[:, :, None]) & ((key.kind != PAD)[:, None, :])
    itself = order[None, None, :] == order[None, first:, None]
    return (real & same("sample") & causal & (own_text | own_view | reads)) | itself
