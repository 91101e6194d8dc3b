"""A Q-Former: N learned queries read a view, and what they read fills its slots.

A baseline of VoCo-LLaMA (arXiv 2406.12275, section 4.2). The Q-Former is BLIP-2's (arXiv 2301.12597), run by transformers'
own module, with cross-attention in every layer. It is as wide as the features, so that a projector that was aligned on features
fits after it. Legend: F views, V vision slots, N vectors, C feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from voco.methods import Method
from voco.sequence.sequence import Layout

NARROWEST = 48  # of a head; BLIP-2's are 64 wide


class QFormer(nn.Module):
    """Learned queries and the layers through which they read a view: self-attention, cross-attention, MLP (4C wide).

    Weights are drawn from torch's generator. Without dropout, training and inference compute the same function.
    """

    def __init__(self, queries: int, layers: int, width: int) -> None:
        super().__init__()
        heads = max(count for count in range(1, max(1, width // NARROWEST) + 1) if width % count == 0)
        spread = width**-0.5  # as in a new language model: the usual 0.02 suits widths of thousands
        self.reader = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                encoder_hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                cross_attention_frequency=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=spread,
            )
        )
        # drawn, not zero as transformers leaves them: equal queries would stay equal
        self.queries = nn.Parameter(torch.randn(queries, width) * spread)

    def forward(self, features: Tensor) -> Tensor:
        """(F, N, C) of features (F, V, C)."""
        queries = self.queries.expand(len(features), -1, -1)
        states: Tensor = self.reader(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return states


def _pool(features: Tensor, _layout: Layout, module: nn.Module | None) -> Tensor:
    assert module is not None
    pooled: Tensor = module(features)
    return pooled


def _module(layout: Layout, width: int) -> QFormer:
    _check(layout)
    return QFormer(layout.tokens, layout.q_former_layers, width)


def _check(layout: Layout) -> None:
    if layout.q_former_layers < 1:  # the queries would read nothing
        raise ValueError(f"compression.q_former_layers: expected at least 1, got {layout.q_former_layers}")


METHOD = Method(_pool, _module, _check)
