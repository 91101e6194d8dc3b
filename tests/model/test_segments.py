"""The segments are the mask: expanded, they are `voco_mask.allowed`, pair by pair, for any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voco.model.attention.segments import Segment, causal_segments
from voco.model.attention.voco_mask import TokenIds, allowed
from voco.sequence.sequence import NONE, PAD, PREFIX, TEXT, VISION, VOCO

Token = tuple[int, int, int, int]  # kind, sample, view, conversation
PADDING: Token = (PAD, NONE, NONE, NONE)


def expanded(found: list[Segment], rows: int, queries: int, keys: int) -> torch.Tensor:
    """(B, Q, K): every pair that the segments name."""
    mask = np.zeros((rows * queries, rows * keys), dtype=bool)
    for one in found:
        ahead = len(one.keys) - len(one.queries)
        for at, query in enumerate(one.queries):
            assert not mask[query].any(), "a query is in one segment only"
            mask[query, one.keys[: ahead + at + 1]] = True
    blocks = [mask[row * queries : (row + 1) * queries, row * keys : (row + 1) * keys] for row in range(rows)]
    assert mask.sum() == sum(block.sum() for block in blocks), "nothing is seen across rows"
    return torch.from_numpy(np.stack(blocks))


@st.composite
def sample_tokens(draw: st.DrawFn, sample: int) -> list[Token]:
    views = [
        [(PREFIX, sample, view, NONE)] * draw(st.integers(0, 1))
        + [(VISION, sample, view, NONE)] * draw(st.integers(0, 4))
        + [(PREFIX, sample, view, NONE)] * draw(st.integers(0, 1))
        + [(VOCO, sample, view, NONE)] * draw(st.integers(1, 3))
        for view in range(draw(st.integers(0, 3)))
    ]
    talks = [[(TEXT, sample, NONE, talk)] * draw(st.integers(1, 4)) for talk in range(draw(st.integers(0 if views else 1, 3)))]
    return [token for part in [*views, *talks] for token in part]


@st.composite
def batches(draw: st.DrawFn) -> TokenIds:
    """Rows of several samples, padded left, right or in the middle."""
    rows, sample = [], 0
    for _ in range(draw(st.integers(1, 2))):
        row: list[Token] = [PADDING] * draw(st.integers(0, 2))
        for _ in range(draw(st.integers(0, 3))):
            row += draw(sample_tokens(sample)) + [PADDING] * draw(st.integers(0, 1))
            sample += 1
        rows.append(row)
    length = max(1, *(len(row) for row in rows))
    padded = torch.tensor([row + [PADDING] * (length - len(row)) for row in rows])
    return TokenIds(*padded.unbind(dim=2))


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(["voco", "none", "avg_pool", "q_former"]), st.data())
def test_segments_are_the_mask(ids: TokenIds, method: str, data: st.DataObject) -> None:
    rows, length = ids.kind.shape
    queries = data.draw(st.integers(1, length))
    real = (ids.kind != PAD)[:, length - queries :]
    mask = allowed(ids, method, queries) & real[:, :, None]
    assert torch.equal(expanded(causal_segments(ids, method, queries), rows, queries, length), mask)


def test_one_view_with_one_question_is_two_segments_and_none_is_one() -> None:
    row = [(PREFIX, 0, 0, NONE), *[(VISION, 0, 0, NONE)] * 6, *[(VOCO, 0, 0, NONE)] * 2, *[(TEXT, 0, NONE, 0)] * 3]
    ids = TokenIds(*torch.tensor([row]).unbind(dim=2))
    prefix, text = causal_segments(ids, "voco")
    assert prefix.queries.tolist() == prefix.keys.tolist() == list(range(9))
    assert (text.queries.tolist(), text.keys.tolist()) == ([9, 10, 11], [7, 8, 9, 10, 11])
    (whole,) = causal_segments(ids, "none")
    assert whole.queries.tolist() == whole.keys.tolist() == list(range(12))


def test_a_view_behind_text_that_reads_it_is_refused() -> None:
    row = [(TEXT, 0, NONE, 0), (VISION, 0, 0, NONE), (VOCO, 0, 0, NONE), (TEXT, 0, NONE, 0)]
    for method in ("voco", "none"):
        with pytest.raises(ValueError, match="stands behind the text at 0"):
            causal_segments(TokenIds(*torch.tensor([row]).unbind(dim=2)), method)
