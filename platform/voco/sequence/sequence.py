"""A sample as token ids at its final length: kinds, views, conversations, positions and what is trained (design section 3).

Image slots are expanded here, so everything that masks and the model need is known before the model runs. Numpy only.

Shapes: L tokens of a sample, V vision slots of a view, N <voco> of a view, S supervised predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from voco.sequence.anyres import Anyres, Size, join_packings
from voco.sequence.chat_template import Turn, encode_parts, render_prompt

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
    eos_id: int  # ends an answer: the tokenizer's own, or what the template ends one with
    pad_id: int
    image_id: int  # fills vision slots, whose embedding is replaced
    voco_id: int
    separator_ids: tuple[int, ...]
    template: str
    newlines: str
    anyres: Anyres | None = None  # LLaVA-1.6: an image of known size is cut into tiles
    q_former_layers: int = 0  # of method q_former

    @property
    def pooled(self) -> bool:
        """N vectors stand in a view's slots instead of V, and no <voco> behind them."""
        return self.method in ("avg_pool", "q_former")

    @property
    def slots(self) -> int:
        """Vision slots of a view in the sequence: V, or N pooled ones. An image of several tiles has its own (`views`)."""
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

    def views(self, sizes: Sequence[Size | None]) -> list[int]:
        """Vision slots of every view of the images: without anyres, or of a frame (size None), one view each.

        Cut into tiles, each tile is a view (compressed alone); under `none` the image is one, packed as LLaVA-1.6 does.
        """
        if self.anyres is None:
            return [self.slots] * len(sizes)
        if self.method == "none":
            return [self.slots if size is None else len(self.anyres.packing(size, self.slots)) for size in sizes]
        return [self.slots] * self.tiles(sizes)

    def tiles(self, sizes: Sequence[Size | None]) -> int:
        """(V, C) features that the images have in all: one each, or their tiles."""
        return sum(1 if size is None or self.anyres is None else self.anyres.tiles(size) for size in sizes)

    def prefix_tokens(self, sizes: Sequence[Size | None]) -> int:
        """Length of all views' prefixes."""
        slots = self.views(sizes)
        return sum(slots) + len(slots) * (self.prefix_length - self.slots + self.voco_tokens())


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
    media: tuple[str, ...]  # sha256 of each image, or the view's name, in order
    cut: int  # text tokens that were left out
    tiles: int | None = None  # (V, C) features that the media have in all; None: one each
    packing: Ints | None = None  # row of its features that each vision slot takes, or NEWLINE; None: all, in order

    def __len__(self) -> int:
        return len(self.ids)


def filler_sample(layout: Layout) -> TokenSample:
    """One token that predicts nothing: stands where an epoch's last step has no sample for a rank."""
    one = {"ids": layout.eos_id, "kinds": TEXT, "view": NONE, "conversation": 0, "position": 0}
    arrays: dict[str, Any] = {key: np.full(1, value, dtype=np.int64) for key, value in one.items()}
    none = np.zeros(0, dtype=np.int64)
    return TokenSample(sample_id="", predict_at=none, predict_id=none, media=(), cut=0, **arrays)


def prefix_columns(layout: Layout, voco_tokens: Sequence[int], slots: Sequence[int] | None = None) -> dict[str, list[int]]:
    """Ids, kinds, views and positions of all views' prefixes; `voco_tokens` holds N of each view, `slots` its vision slots."""
    ids: list[int] = []
    kinds: list[int] = []
    view: list[int] = []
    position: list[int] = []
    bos = [] if layout.bos_id is None else [layout.bos_id]
    offset = 0
    for index, (count, seen) in enumerate(zip(voco_tokens, slots or [layout.slots] * len(voco_tokens), strict=True)):
        ids += bos + [layout.image_id] * seen + list(layout.separator_ids) + [layout.voco_id] * count
        kinds += [PREFIX] * len(bos) + [VISION] * seen + [PREFIX] * len(layout.separator_ids) + [VOCO] * count
        length = layout.prefix_length - layout.slots + seen + count
        view += [index] * length
        position += range(offset, offset + length)
        # under voco the next view is shifted by this one's N only, so a view compressed alone fits any slot
        offset += count if layout.method == "voco" else length
    return {"ids": ids, "kinds": kinds, "view": view, "position": position}


def text_start(layout: Layout, voco_tokens: Sequence[int], slots: Sequence[int] | None = None) -> int:
    """Position of the first text token: C + sum of N under voco, the prefix's length otherwise, 0 without views."""
    if not voco_tokens or layout.method == "voco":
        return layout.prefix_length + sum(voco_tokens) if voco_tokens else 0
    seen = sum(slots or [layout.slots] * len(voco_tokens))
    return seen + len(voco_tokens) * (layout.prefix_length - layout.slots) + sum(voco_tokens)


def build_sample(
    sample_id: str,
    conversations: Sequence[list[Turn]],
    media: Sequence[str],
    tokenizer: Any,
    layout: Layout,
    voco_tokens: Sequence[int] | None = None,
    max_tokens: int | None = None,
    cached: bool = False,
    sizes: Sequence[Size | None] | None = None,
) -> TokenSample:
    """One sample: its views' prefixes, then each conversation as a text segment of its own.

    `media` holds one content hash an image, `sizes` its height and width: with anyres it is then cut into tiles, and without
    a size it is one view. `voco_tokens` is N of each view (default: the layout's). A conversation that
    would pass `max_tokens` together with the prefix is cut at its end; the prefix never is. With `cached` the views are
    read from a cache: only their text is in the sample, at the positions that it has behind them, and they count N each.
    Raises ValueError when the prefix alone passes `max_tokens`.
    """
    known: Sequence[Size | None] = [None] * len(media) if sizes is None else sizes
    slots = layout.views(known)
    counts = [layout.voco_tokens() for _ in slots] if voco_tokens is None else list(voco_tokens)
    if len(counts) != len(slots) or len(known) != len(media):
        raise ValueError(f"expected N for each of {len(slots)} views of {len(media)} media, got {len(counts)}")
    columns = prefix_columns(layout, () if cached else counts, () if cached else slots)
    columns["conversation"] = [NONE] * len(columns["ids"])
    predict_at: list[int] = []
    predict_id: list[int] = []
    size, start, cut = len(columns["ids"]), text_start(layout, counts, slots), 0
    taken = sum(counts) if cached else size
    if max_tokens is not None and taken >= max_tokens:
        raise ValueError(f"a prefix of {taken} tokens leaves no room for text in max_tokens {max_tokens}")
    for index, turns in enumerate(conversations):
        ids, trained = encode_parts(render_prompt(turns, layout.template, layout.newlines, bool(media)), tokenizer, layout.eos_id)
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
        tiles=None if cached or layout.anyres is None else layout.tiles(known),
        packing=None if cached or layout.method != "none" else join_packings(layout.anyres, known, layout.slots),
        **arrays,
    )
