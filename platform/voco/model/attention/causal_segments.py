"""The mask as causal segments: one kind for a view, one for a conversation. Together they have exactly the allowed pairs.

A view's prefix is one causal segment; a conversation's text is another, which reads the <voco> tokens of its sample first
(docs/method.md). Pure, on the host, from the same ids as `voco_mask.pair_mask`; a test checks that the two are equal.
Legend: B rows, Q queries and K keys of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from voco.model.attention.voco_mask import TokenIds
from voco.sequence.sequence import PAD, TEXT, VOCO

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """Query i of q sees the first k - q + i + 1 of the k keys: causal, aligned at the end. Both int64, ascending."""

    queries: Ints  # (q,) indices into the flattened (B x Q)
    keys: Ints  # (k,) indices into the flattened (B x K); k >= q


def causal_segments(ids: TokenIds, views_apart: bool, queries: int | None = None) -> list[Segment]:
    """`pair_mask(ids, views_apart, queries)` of real tokens, in the order of first queries; no segment has padding.

    Raises ValueError when a view's token comes after text of its sample: causal segments cannot express that.
    """
    columns = [np.asarray(column) for column in (ids.kind, ids.sample, ids.view, ids.conversation)]
    rows, length = columns[0].shape
    first = length - (length if queries is None else queries)
    segments = []
    for row in range(rows):
        kind, sample, view, conversation = (column[row] for column in columns)
        for tokens in _group_by(np.flatnonzero(kind != PAD), sample):
            for context, own in _parts(tokens, kind, view, conversation, views_apart):
                if len(context) and context[-1] > own[0]:
                    raise ValueError(f"row {row}: a view's token at {context[-1]} comes after the text at {own[0]} that reads it")
                own_queries = own[own >= first]
                if len(own_queries):
                    keys = np.concatenate([context, own]) + row * length
                    segments.append(Segment(own_queries - first + row * (length - first), keys))
    return sorted(segments, key=lambda segment: int(segment.queries[0]))


@dataclass(frozen=True)
class SegmentRows:
    """The part of a batch's segments that some queries need, as one row of U queries and W keys."""

    keys: Ints  # (W,) ascending, of the flattened (B x K)
    queries: Ints  # (U,) the index of each query among `keys`, ascending
    back: Ints  # (M,) the index among the queries of each row that was named
    segments: list[Segment]  # over these queries and keys


def segments_of_rows(segments: Sequence[Segment], rows: Ints) -> SegmentRows:
    """What `rows` (M,), queries of square batches (B x L queries and as many keys), need of `segments`.

    Each segment is cut to the queries from the first to the last one that is named, and to the keys that these see, so it stays
    causal and aligned at its end. Without rows it is the first query, because a kernel call needs one.
    """
    rows_or_first = rows if len(rows) else segments[0].queries[:1]
    named = np.zeros(1 + max(int(segment.queries[-1]) for segment in segments), dtype=bool)
    named[rows_or_first] = True
    kept = []
    for segment in segments:
        at = np.flatnonzero(named[segment.queries])
        if len(at):
            last = int(at[-1]) + 1
            seen = len(segment.keys) - (len(segment.queries) - last)
            kept.append(Segment(segment.queries[at[0] : last], segment.keys[:seen]))
    keys = np.unique(np.concatenate([segment.keys for segment in kept]))
    queries = np.unique(np.concatenate([segment.queries for segment in kept]))
    within = [
        Segment(np.searchsorted(queries, segment.queries), np.searchsorted(keys, segment.keys)) for segment in kept
    ]  # each a query's row is also a key's: it sees itself
    return SegmentRows(keys, np.searchsorted(keys, queries), np.searchsorted(queries, rows), within)


def _parts(tokens: Ints, kind: Ints, view: Ints, conversation: Ints, views_apart: bool) -> Iterator[tuple[Ints, Ints]]:
    """The segments of one sample's tokens: what each reads before its own tokens, and its own tokens."""
    text = kind[tokens] == TEXT
    prefix, texts = tokens[~text], _group_by(tokens[text], conversation)
    nothing = prefix[:0]
    if views_apart:
        yield from ((nothing, own) for own in _group_by(prefix, view))
        prefix = prefix[kind[prefix] == VOCO]
    elif len(texts) == 1 and len(prefix) and prefix[-1] < texts[0][0]:
        yield nothing, tokens  # one question about views that it sees completely: plain causal
        return
    elif len(prefix):
        yield nothing, prefix
    yield from ((prefix, own) for own in texts)


def _group_by(indices: Ints, label: Ints) -> list[Ints]:
    """`indices` split by `label[indices]`, each group in its own order."""
    order = np.argsort(label[indices], kind="stable")
    cuts = np.flatnonzero(np.diff(label[indices][order])) + 1
    return [group for group in np.split(indices[order], cuts) if len(group)]
