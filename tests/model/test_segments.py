"""The segments are the mask: expanded, they are `voco_mask.allowed`, pair by pair, for any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voco.job.tables import METHODS
from voco.model.attention.causal_segments import Segment, causal_segments, segments_of_rows
from voco.model.attention.voco_mask import TokenIds, allowed
from voco.sequence.sequence import NONE, PAD, PREFIX, TEXT, VISION, VOCO

Token = tuple[int, int, int, int]  # kind, sample, view, conversation
PADDING: Token = (PAD, NONE, NONE, NONE)


def expanded(segments: list[Segment], rows: int, queries: int, keys: int) -> torch.Tensor:
    """(B, Q, K): every pair in the segments."""
    mask = np.zeros((rows * queries, rows * keys), dtype=bool)
    for segment in segments:
        ahead = len(segment.keys) - len(segment.queries)
        for index, query in enumerate(segment.queries):
            assert not mask[query].any(), "a query is in one segment only"
            mask[query, segment.keys[: ahead + index + 1]] = True
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
    assert torch.equal(expanded(causal_segments(ids, METHODS[method].views_apart, queries), rows, queries, length), mask)


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(["voco", "none"]), st.data())
def test_some_rows_keep_their_pairs_and_lose_the_other_queries(ids: TokenIds, method: str, data: st.DataObject) -> None:
    rows, length = ids.kind.shape
    real = np.flatnonzero((ids.kind != PAD).numpy())
    if not len(real):
        return
    chosen = np.array(sorted(data.draw(st.sets(st.sampled_from(real.tolist()), max_size=4))), dtype=np.int64)
    segments = causal_segments(ids, METHODS[method].views_apart)
    part = segments_of_rows(segments, chosen)
    small = expanded(part.segments, 1, len(part.queries), len(part.keys))[0]
    assert small.any(dim=1).all(), "every query is in a segment"
    assert small.any(dim=0).all(), "every key is seen"
    assert np.array_equal(part.keys[part.queries][part.back], chosen)
    mask = allowed(ids, method)
    for query, row in enumerate(part.keys[part.queries].tolist()):
        seen = torch.zeros(rows * length, dtype=torch.bool)
        seen[part.keys[small[query].numpy()]] = True
        expected = torch.zeros(rows, length, dtype=torch.bool)
        expected[row // length] = mask[row // length, row % length]
        assert torch.equal(seen, expected.flatten())
    if len(chosen):
        named = {min(segment.queries) for segment in segments if set(segment.queries) & set(chosen.tolist())}
        assert len(part.segments) == len(named), "segments without a named row are left out"


def test_one_view_and_one_question_are_two_segments_or_a_single_one() -> None:
    row = [(PREFIX, 0, 0, NONE), *[(VISION, 0, 0, NONE)] * 6, *[(VOCO, 0, 0, NONE)] * 2, *[(TEXT, 0, NONE, 0)] * 3]
    ids = TokenIds(*torch.tensor([row]).unbind(dim=2))
    prefix, text = causal_segments(ids, views_apart=True)
    assert prefix.queries.tolist() == prefix.keys.tolist() == list(range(9))
    assert (text.queries.tolist(), text.keys.tolist()) == ([9, 10, 11], [7, 8, 9, 10, 11])
    (single,) = causal_segments(ids, views_apart=False)
    assert single.queries.tolist() == single.keys.tolist() == list(range(12))


def test_a_view_after_text_that_reads_it_is_an_error() -> None:
    row = [(TEXT, 0, NONE, 0), (VISION, 0, 0, NONE), (VOCO, 0, 0, NONE), (TEXT, 0, NONE, 0)]
    for views_apart in (True, False):
        with pytest.raises(ValueError, match="comes after the text at 0"):
            causal_segments(TokenIds(*torch.tensor([row]).unbind(dim=2)), views_apart)
