"""A sample as token ids at its final length: kinds, views, conversations, positions and what is trained (docs/method.md).

Image slots are expanded here, so all that masks and the model need is final before the model runs. Numpy only.

Shapes: L tokens of a sample, V vision slots of a view, N <voco> of a view, S supervised predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from voco.job.chat_templates import CHAT_TEMPLATES
from voco.job.config import TrainedMethod
from voco.job.tables import METHODS, MethodRow
from voco.sequence.anyres import Anyres, Size, join_packings
from voco.sequence.chat_template import Turn, encode_parts, render_prompt

TEXT, PREFIX, VISION, VOCO, PAD = range(5)  # kinds; PREFIX is BOS and the separators of a view
NONE = -1  # no view, no conversation
SEPARATOR = "\n"  # between an image and what follows it

Ints = npt.NDArray[np.int64]


class Layout(BaseModel):
    """Constants of a checkpoint that shape its sequences; saved in its config and part of every cache's key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: TrainedMethod
    tokens: int  # N of a view by default
    vision_slots: int  # V of the tower
    bos_id: int | None
    eos_id: int  # ends an answer: the tokenizer's own, or the template's
    stop_ids: tuple[int, ...] = ()  # further ids that end one, as the model that it started from was saved with
    pad_id: int
    image_id: int  # fills vision slots; the model replaces its embeddings
    voco_id: int
    separator_ids: tuple[int, ...]
    template: str
    newlines: str
    system: str | None = None  # replaces the template's own system prompt; "" for none
    anyres: Anyres | None = None  # LLaVA-1.6: an image of known size is cut into tiles
    q_former_layers: int = 0  # of method q_former

    @property
    def rule(self) -> MethodRow:
        """What the table says about the method."""
        return METHODS[self.method]

    @property
    def drops_questions(self) -> bool:
        """Trained on captions: the model cannot answer a question."""
        return CHAT_TEMPLATES[self.template].drops_questions

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, the trained one first."""
        return (self.eos_id, *(token for token in self.stop_ids if token != self.eos_id))

    @property
    def slots(self) -> int:
        """Vision slots of a view in the sequence: V, or N pooled ones. An image of several tiles may have more (`views`)."""
        return self.tokens if self.rule.pooled else self.vision_slots

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """BOS and the separators of a view, in order."""
        return (() if self.bos_id is None else (self.bos_id,)) + self.separator_ids

    @property
    def prefix_length(self) -> int:
        """C: a view's prefix without its <voco> tokens."""
        return self.slots + len(self.prefix_ids)

    @property
    def view_length(self) -> int:
        """Tokens of a view in a sequence."""
        return self.prefix_length + self.voco_tokens()

    @property
    def cached_from(self) -> int:
        """Position of the first row of a view that text reads: a <voco> where views are apart, else the start of the prefix."""
        return self.prefix_length if self.rule.views_apart else 0

    def voco_tokens(self, n: int | None = None) -> int:
        """<voco> tokens of a view; a pooled view has none."""
        return 0 if self.rule.pooled else self.tokens if n is None else n

    def views(self, sizes: Sequence[Size | None]) -> list[int]:
        """Vision slots of every view of the images. Without anyres an image is one view, and so is a frame (size None).

        An image that is cut into tiles is one view for each tile; under `none` it is one view, packed as LLaVA-1.6 does.
        """
        if self.anyres is None:
            return [self.slots] * len(sizes)
        if self.rule.uncompressed:
            return [self.slots if size is None else len(self.anyres.packing(size, self.slots)) for size in sizes]
        return [self.slots] * self.tiles(sizes)

    def tiles(self, sizes: Sequence[Size | None]) -> int:
        """Number of (V, C) features of the images in all: one each, or one for each tile."""
        return sum(1 if size is None or self.anyres is None else self.anyres.tiles(size) for size in sizes)

    def prefix_tokens(self, sizes: Sequence[Size | None]) -> int:
        """Length of all views' prefixes."""
        slots = self.views(sizes)
        return sum(slots) + len(slots) * (len(self.prefix_ids) + self.voco_tokens())


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
    cut: int  # text tokens that did not fit
    tiles: int | None = None  # (V, C) features of all media; None: one each
    packing: Ints | None = None  # for each vision slot the row of its features, or NEWLINE; None: all rows, in order
    whole: bool = False  # in a batch under the VoCo mask: uncompressed, causal over all of its views

    def __len__(self) -> int:
        return len(self.ids)


def filler_sample(layout: Layout) -> TokenSample:
    """One token that predicts nothing, for a rank that has no sample in an epoch's last step."""
    token = {"ids": layout.eos_id, "kinds": TEXT, "view": NONE, "conversation": 0, "position": 0}
    arrays: dict[str, Any] = {key: np.full(1, value, dtype=np.int64) for key, value in token.items()}
    none = np.zeros(0, dtype=np.int64)
    return TokenSample(sample_id="", predict_at=none, predict_id=none, media=(), cut=0, **arrays)


def prefix_columns(layout: Layout, voco_tokens: Sequence[int], slots: Sequence[int] | None = None) -> dict[str, list[int]]:
    """Ids, kinds, views and positions of all views' prefixes; `voco_tokens` has N of each view, `slots` its vision slots."""
    ids: list[int] = []
    kinds: list[int] = []
    view: list[int] = []
    position: list[int] = []
    bos = [] if layout.bos_id is None else [layout.bos_id]
    separators = list(layout.separator_ids)
    offset = 0
    for index, (n, vision) in enumerate(zip(voco_tokens, slots or [layout.slots] * len(voco_tokens), strict=True)):
        ids += bos + [layout.image_id] * vision + separators + [layout.voco_id] * n
        kinds += [PREFIX] * len(bos) + [VISION] * vision + [PREFIX] * len(separators) + [VOCO] * n
        length = len(layout.prefix_ids) + vision + n
        view += [index] * length
        position += range(offset, offset + length)
        # where views are apart, the next one starts only N positions later, so a view that was compressed alone fits any slot
        offset += n if layout.rule.views_apart else length
    return {"ids": ids, "kinds": kinds, "view": view, "position": position}


def text_start(layout: Layout, voco_tokens: Sequence[int], slots: Sequence[int] | None = None) -> int:
    """Position of the first text token: C + sum of N where views are apart, else the prefixes' length; 0 without views."""
    if not voco_tokens:
        return 0
    if layout.rule.views_apart:
        return layout.prefix_length + sum(voco_tokens)
    vision = sum(slots or [layout.slots] * len(voco_tokens))
    return vision + len(voco_tokens) * len(layout.prefix_ids) + sum(voco_tokens)


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
    """One sample: its views' prefixes, then each conversation as a separate text segment.

    `media` has a content hash for each image, `sizes` its height and width: with anyres an image of known size is cut into
    tiles, any other is one view. `voco_tokens` is N of each view (default: the layout's). A conversation that does not fit
    into `max_tokens` together with the prefix is cut at its end; the prefix never is. With `cached` the views are read from a
    cache: the sample holds the text alone, at its positions after the views, and each view counts as N tokens.
    Raises ValueError when the prefix alone fills `max_tokens`.
    """
    image_sizes: Sequence[Size | None] = [None] * len(media) if sizes is None else sizes
    slots = layout.views(image_sizes)
    counts = [layout.voco_tokens() for _ in slots] if voco_tokens is None else list(voco_tokens)
    if len(counts) != len(slots) or len(image_sizes) != len(media):
        raise ValueError(f"expected N for each of {len(slots)} views of {len(media)} media, got {len(counts)}")
    columns = prefix_columns(layout, () if cached else counts, () if cached else slots)
    columns["conversation"] = [NONE] * len(columns["ids"])
    predict_at: list[int] = []
    predict_id: list[int] = []
    prefix, start, cut = len(columns["ids"]), text_start(layout, counts, slots), 0
    view_tokens = sum(counts) if cached else prefix
    if max_tokens is not None and view_tokens >= max_tokens:
        raise ValueError(f"a prefix of {view_tokens} tokens leaves no room for text in max_tokens {max_tokens}")
    follows = "" if not media else None if counts[-1] else SEPARATOR
    for number, turns in enumerate(conversations):
        parts = render_prompt(turns, layout.template, layout.newlines, bool(media), layout.system)
        ids, trained = encode_parts(parts, tokenizer, layout.eos_id, follows)
        if not media and layout.bos_id is not None:
            ids, trained = [layout.bos_id, *ids], [False, *trained]
        room = len(ids) if max_tokens is None else max_tokens - view_tokens
        cut += max(0, len(ids) - room)
        ids, trained = ids[:room], trained[:room]
        first = len(columns["ids"])
        for index, (token, is_trained) in enumerate(zip(ids, trained, strict=True)):
            # the last prefix token predicts the first text token of every conversation
            if is_trained and (index or prefix):
                predict_at.append(first + index - 1 if index else prefix - 1)
                predict_id.append(token)
        columns["ids"] += ids
        columns["kinds"] += [TEXT] * len(ids)
        columns["view"] += [NONE] * len(ids)
        columns["conversation"] += [number] * len(ids)
        columns["position"] += range(start, start + len(ids))
    arrays: dict[str, Any] = {key: np.asarray(column, dtype=np.int64) for key, column in columns.items()}
    packed = layout.rule.uncompressed and not cached
    return TokenSample(
        sample_id=sample_id,
        predict_at=np.asarray(predict_at, dtype=np.int64),
        predict_id=np.asarray(predict_id, dtype=np.int64),
        media=tuple(media),
        cut=cut,
        tiles=None if cached or layout.anyres is None else layout.tiles(image_sizes),
        packing=join_packings(layout.anyres, image_sizes, layout.slots) if packed else None,
        **arrays,
    )
