"""The mask as causal segments: two kinds of them per view and question, and no pair of tokens that may not meet.

A view's prefix is one causal segment; a conversation's text is another, which the <voco> tokens of its sample precede
(design section 3). Pure, on the host, from the same ids as `voco_mask.allowed`; a test holds the two equal.
Legend: B rows, Q queries and K keys of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def causal_segments(ids: TokenIds, method: str, queries: int | None = None) -> list[Segment]:
    """What `allowed(ids, method, queries)` says of real tokens, in the order of their first queries; padding is in none.

    Raises ValueError when a token of a view stands behind text of its sample: that is no longer causal segments.
    """
    columns = [np.asarray(column) for column in (ids.kind, ids.sample, ids.view, ids.conversation)]
    rows, length = columns[0].shape
    asked = length if queries is None else queries
    found = []
    for row in range(rows):
        kind, sample, view, conversation = (column[row] for column in columns)
        real = np.flatnonzero(kind != PAD)
        for mine in _groups(real, sample):
            for behind, own in _parts(mine, kind, view, conversation, method):
                if len(behind) and behind[-1] > own[0]:
                    raise ValueError(
                        f"row {row}: a view's token at {behind[-1]} stands behind the text at {own[0]} that reads it"
                    )
                wanted = own[own >= length - asked]
                if len(wanted):
                    keys = np.concatenate([behind, own]) + row * length
                    found.append(Segment(wanted - (length - asked) + row * asked, keys))
    return sorted(found, key=lambda segment: int(segment.queries[0]))


def _parts(mine: Ints, kind: Ints, view: Ints, conversation: Ints, method: str) -> Iterator[tuple[Ints, Ints]]:
    """Of one sample's tokens: what each segment reads before its own tokens, and its own tokens."""
    text = kind[mine] == TEXT
    prefix, talks = mine[~text], _groups(mine[text], conversation)
    nothing = prefix[:0]
    if method == "voco":
        yield from ((nothing, own) for own in _groups(prefix, view))
        prefix = prefix[kind[prefix] == VOCO]
    elif len(talks) == 1 and len(prefix) and prefix[-1] < talks[0][0]:
        yield nothing, mine  # one question about views that it sees whole: plain causal
        return
    elif len(prefix):
        yield nothing, prefix
    yield from ((prefix, own) for own in talks)


def _groups(at: Ints, label: Ints) -> list[Ints]:
    """Indices `at`, apart by `label[at]`, each group in its own order."""
    order = np.argsort(label[at], kind="stable")
    cuts = np.flatnonzero(np.diff(label[at][order])) + 1
    return [group for group in np.split(at[order], cuts) if len(group)]
