"""A sample as token ids at its final length: kinds, views, conversations, positions and what is trained (design section 3).

Image slots are expanded here, so everything that masks and the model need is known before the model runs. Numpy only.

Shapes: L tokens of a sample, V vision slots of a view, N <voco> of a view, S supervised predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from voco.conversation import Part, Turn, render

TEXT, PREFIX, VISION, VOCO, PAD = range(5)  # kinds; PREFIX is BOS and the separators of a view
NONE = -1  # no view, no conversation

Ints = npt.NDArray[np.int64]


class Layout(BaseModel):
    """Constants of a checkpoint that shape its sequences; saved in its config and part of every cache's key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["voco", "none", "avg_pool", "q_former"]
    tokens: int  # N, what a view gets unless it is told otherwise
    vision_slots: int  # V as the tower gives them
    bos_id: int | None
    eos_id: int
    pad_id: int
    image_id: int  # fills vision slots, whose embedding is replaced
    voco_id: int
    separator_ids: tuple[int, ...]
    template: str
    newlines: str
    q_former_layers: int = 0  # of method q_former

    @property
    def pooled(self) -> bool:
        """N vectors stand in a view's slots instead of V, and no <voco> behind them."""
        return self.method in ("avg_pool", "q_former")

    @property
    def slots(self) -> int:
        """Vision slots that stand in the sequence: V, or N pooled ones."""
        return self.tokens if self.pooled else self.vision_slots

    @property
    def prefix_length(self) -> int:
        """C: a view's prefix without its <voco> tokens."""
        return (self.bos_id is not None) + self.slots + len(self.separator_ids)

    @property
    def view_length(self) -> int:
        """Tokens of a view in a sequence."""
        return self.prefix_length + self.voco_tokens()

    @property
    def cached_from(self) -> int:
        """Position of the first row of a view that text reads: VoCo keeps its own rows, the others the whole prefix."""
        return self.prefix_length if self.method == "voco" else 0

    def voco_tokens(self, n: int | None = None) -> int:
        """<voco> tokens of a view: none where it is pooled."""
        return 0 if self.pooled else self.tokens if n is None else n


@dataclass(frozen=True)
class TokenSample:
    """One sequence. All arrays are int64 of shape (L,), the predictions (S,)."""

    sample_id: str
    ids: Ints
    kinds: Ints
    view: Ints  # NONE for text
    conversation: Ints  # NONE for a prefix
    position: Ints
    predict_at: Ints  # token whose output predicts ...
    predict_id: Ints  # ... this id
    media: tuple[str, ...]  # sha256 of each view's image, in order
    cut: int  # text tokens that were left out

    def __len__(self) -> int:
        return len(self.ids)


def filler(layout: Layout) -> TokenSample:
    """One token that predicts nothing: stands where an epoch's last step has no sample for a rank."""
    one = {"ids": layout.eos_id, "kinds": TEXT, "view": NONE, "conversation": 0, "position": 0}
    arrays = {key: np.full(1, value, dtype=np.int64) for key, value in one.items()}
    none = np.zeros(0, dtype=np.int64)
    return TokenSample(sample_id="", predict_at=none, predict_id=none, media=(), cut=0, **arrays)


def encode(parts: Sequence[Part], tokenizer: Any, layout: Layout) -> tuple[list[int], list[bool]]:
    """Ids and whether each is trained on. Adjoining strings are tokenised as one and marked by character offsets.

    Text that spells a special token stays text: control tokens come from the template only, by id.
    """
    ids: list[int] = []
    trained: list[bool] = []
    run: list[Part] = []

    def flush() -> None:
        text = "".join(part.text for part in run)
        if text:
            marks = np.concatenate([np.full(len(part.text), part.trained) for part in run])
            coded, ends = _tokenise(tokenizer, text)
            ids.extend(coded)
            # a token belongs to the part in which it ends: the space before an answer is part of its first token
            trained.extend(bool(marks[end]) for end in ends)
        run.clear()

    for part in parts:
        if part.control:
            flush()
            ids.append(layout.eos_id if part.text == "eos" else tokenizer.convert_tokens_to_ids(part.text))
            trained.append(part.trained)
        else:
            run.append(part)
    flush()
    return ids, trained


@lru_cache(maxsize=1 << 14)  # questions repeat: in VQA sets most texts are ones that were seen before
def _tokenise(tokenizer: Any, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of a text, and the index of each token's last character."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return tuple(coded["input_ids"]), tuple(max(start, stop - 1) for start, stop in coded["offset_mapping"])


def prefix(layout: Layout, voco_tokens: Sequence[int]) -> dict[str, list[int]]:
    """Ids, kinds, views and positions of all views' prefixes; `voco_tokens` holds N of each view."""
    ids: list[int] = []
    kinds: list[int] = []
    view: list[int] = []
    position: list[int] = []
    bos = [] if layout.bos_id is None else [layout.bos_id]
    offset = 0
    for index, count in enumerate(voco_tokens):
        ids += bos + [layout.image_id] * layout.slots + list(layout.separator_ids) + [layout.voco_id] * count
        kinds += [PREFIX] * len(bos) + [VISION] * layout.slots + [PREFIX] * len(layout.separator_ids) + [VOCO] * count
        length = layout.prefix_length + count
        view += [index] * length
        position += range(offset, offset + length)
        # under voco the next view is shifted by this one's N only, so a view compressed alone fits any slot
        offset += count if layout.method == "voco" else length
    return {"ids": ids, "kinds": kinds, "view": view, "position": position}


def text_start(layout: Layout, voco_tokens: Sequence[int]) -> int:
    """Position of the first text token: C + sum of N under voco, the prefix's length otherwise, 0 without views."""
    if not voco_tokens:
        return 0
    if layout.method == "voco":
        return layout.prefix_length + sum(voco_tokens)
    return len(voco_tokens) * layout.prefix_length + sum(voco_tokens)


def build(
    sample_id: str,
    conversations: Sequence[list[Turn]],
    media: Sequence[str],
    tokenizer: Any,
    layout: Layout,
    voco_tokens: Sequence[int] | None = None,
    max_tokens: int | None = None,
    cached: bool = False,
) -> TokenSample:
    """One sample: its views' prefixes, then each conversation as a text segment of its own.

    `media` holds one content hash a view; `voco_tokens` N of each view (default: the layout's). A conversation that
    would pass `max_tokens` together with the prefix is cut at its end; the prefix never is. With `cached` the views are
    read from a cache: only their text is in the sample, at the positions that it has behind them, and they count N each.
    Raises ValueError when the prefix alone passes `max_tokens`.
    """
    counts = [layout.voco_tokens() for _ in media] if voco_tokens is None else list(voco_tokens)
    if len(counts) != len(media):
        raise ValueError(f"expected N for each of {len(media)} views, got {len(counts)}")
    columns = prefix(layout, () if cached else counts)
    columns["conversation"] = [NONE] * len(columns["ids"])
    predict_at: list[int] = []
    predict_id: list[int] = []
    size, start, cut = len(columns["ids"]), text_start(layout, counts), 0
    taken = sum(counts) if cached else size
    if max_tokens is not None and taken >= max_tokens:
        raise ValueError(f"a prefix of {taken} tokens leaves no room for text in max_tokens {max_tokens}")
    for index, turns in enumerate(conversations):
        ids, trained = encode(render(turns, layout.template, layout.newlines, bool(media)), tokenizer, layout)
        if not media and layout.bos_id is not None:
            ids, trained = [layout.bos_id, *ids], [False, *trained]
        room = len(ids) if max_tokens is None else max_tokens - taken
        cut += max(0, len(ids) - room)
        ids, trained = ids[:room], trained[:room]
        first = len(columns["ids"])
        for at, (token, is_trained) in enumerate(zip(ids, trained, strict=True)):
            # the first text token is predicted by the last prefix token, whichever conversation it starts
            if is_trained and (at or size):
                predict_at.append(first + at - 1 if at else size - 1)
                predict_id.append(token)
        columns["ids"] += ids
        columns["kinds"] += [TEXT] * len(ids)
        columns["view"] += [NONE] * len(ids)
        columns["conversation"] += [index] * len(ids)
        columns["position"] += range(start, start + len(ids))
    arrays = {key: np.asarray(column, dtype=np.int64) for key, column in columns.items()}
    return TokenSample(
        sample_id=sample_id,
        predict_at=np.asarray(predict_at, dtype=np.int64),
        predict_id=np.asarray(predict_id, dtype=np.int64),
        media=tuple(media),
        cut=cut,
        **arrays,
    )
