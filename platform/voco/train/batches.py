"""Rows of `samples/` to token samples and batches: each row group is read once, each sample tokenised when a step takes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from voco.job.config import Training
from voco.model.batch import Batch, CachedBatch, collate, with_teacher
from voco.model.voco_llama import VocoLlama
from voco.precompute.feature_store import FeatureStore
from voco.sequence.chat_template import Turn
from voco.sequence.sequence import Layout, TokenSample, build_sample, filler_sample
from voco.store.samples import COLUMNS, MEDIA_BYTES, SampleTables, images_of, medium_bytes, sizes_of
from voco.train.live_images import LiveImages
from voco.train.packing import split_by_tokens, split_evenly
from voco.train.sampler import LIVE_GROUPS, Rows
from voco.train.step_metrics import NO_FACTS, StepFacts
from voco.train.token_draw import WHOLE

BUILT_SAMPLES = 2048  # of tables with a weight above 1: token samples that are kept for their next use, about 40 KB each
Tokens = Sequence[int] | None  # N of the views of each of several samples, or WHOLE; None: the layout's
Part = tuple[dict[str, Any], list[list[Turn]]]  # what a sample is made of: its row, and its conversations' turns
Split = Callable[[list[int]], list[list[int]]]  # lengths of samples to the samples of each micro-batch, some of them empty


@dataclass(frozen=True)
class StepData:
    """What one worker trains on in one step."""

    batches: list[Batch] | list[CachedBatch]  # micro-batches
    cut: int  # text tokens that `max_tokens` left out of them
    sample_ids: tuple[str, ...] = ()  # of its rows, in their order; "" where the tail of an epoch is filled
    facts: StepFacts = NO_FACTS  # what the step takes of this worker
    example: TokenSample | None = None  # its first sample that is trained
    # predicts nothing: repeated where another worker has more micro-batches; None where all have the same number
    filler: Batch | CachedBatch | None = None

    def pinned(self) -> StepData:
        """The same in page-locked memory, so that copies to a device overlap with its work. Needs CUDA."""
        filler = None if self.filler is None else self.filler.pinned()
        return replace(self, batches=[batch.pinned() for batch in self.batches], filler=filler)  # type: ignore[arg-type]


class SampleRows:
    """The samples of row groups, as parts. The last `limit` row groups are kept (`sampler.live_groups` says how many).

    They are kept as Arrow tables, several times smaller than Python objects; a row is converted when a step takes it. Under
    `encoded` each medium of a row has its bytes.
    """

    def __init__(self, tables: SampleTables, share_vision: bool, limit: int = 2 * LIVE_GROUPS, encoded: bool = False) -> None:
        self.tables, self.share_vision, self.limit, self.encoded = tables, share_vision, limit, encoded
        self.turns_of: Callable[[dict[str, Any]], list[Turn]] = itemgetter("turns")  # of a conversation
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._firsts: dict[int, npt.NDArray[np.int64]] = {}  # without `share_vision`: the first sample of each row of a group
        self._rows: dict[tuple[int, int], dict[str, Any]] = {}  # converted since the last `load`

    def load(self, groups: Iterable[int]) -> None:
        """Read the row groups that are not in memory, several at a time. All of these stay, even above the limit."""
        current = list(dict.fromkeys(groups))
        columns = [*COLUMNS, MEDIA_BYTES] if self.encoded else COLUMNS
        for group, table in self.tables.tables(columns, [group for group in current if group not in self._groups]):
            self._groups[group] = table
            if not self.share_vision:
                counts = pc.list_value_length(table["conversations"]).to_numpy()
                self._firsts[group] = np.cumsum(counts) - counts
        for group in current:
            self._groups.move_to_end(group)
        while len(self._groups) > max(self.limit, len(current)):
            self._firsts.pop(self._groups.popitem(last=False)[0], None)
        self._rows.clear()

    def part(self, group: int, index: int) -> Part:
        """One sample of a row group that was loaded."""
        if self.share_vision:
            row = self._row(group, index)
            return row, [self.turns_of(conversation) for conversation in row["conversations"]]
        firsts = self._firsts[group]
        number = int(np.searchsorted(firsts, index, side="right")) - 1
        row = self._row(group, number)
        return row, [self.turns_of(row["conversations"][index - int(firsts[number])])]

    def _row(self, group: int, number: int) -> dict[str, Any]:
        if (group, number) not in self._rows:
            (row,) = self._groups[group].slice(number, 1).to_pylist()
            part, _ = self.tables.address(group)
            for medium in (row["media"] or []) if self.encoded else []:
                medium["bytes"] = medium_bytes(medium, part)
            self._rows[group, number] = row
        return self._rows[group, number]


class TrainingSamples:
    """Token samples by (row group, row in it), and N of their views. A sample is tokenised when it is taken.

    `views` names the views of a row: images by their hash, or under `cached` the indices of its frames; None for a row whose
    frames could not be decoded. `rows` are those of a reader of the same tables (default: read here).
    """

    def __init__(
        self,
        tables: SampleTables,
        tokenizer: Any,
        layout: Layout,
        block: Training,
        views: Callable[[dict[str, Any]], list[str] | None],
        cached: bool = False,
        extra_tokens: int = 0,  # of a view, beyond max_tokens: a teacher's text is cut like the student's
        rows: SampleRows | None = None,
    ) -> None:
        self.tables, self.tokenizer, self.layout, self.block = tables, tokenizer, layout, block
        self.views, self.cached, self.extra_tokens = views, cached, extra_tokens
        self.rows = SampleRows(tables, block.share_vision) if rows is None else rows
        self._built: OrderedDict[tuple[int, int, int], TokenSample] = OrderedDict()

    def take(self, rows: Rows, tokens: Tokens = None) -> list[TokenSample]:
        """The samples at (n, 2) rows; the fill of an epoch's tail is left out. `tokens`: N of each row, or WHOLE."""
        sizes = [self.layout.tokens] * len(rows) if tokens is None else tokens
        addresses = [(group, row, n) for (group, row), n in zip(rows.tolist(), sizes, strict=True) if group >= 0]
        self.rows.load(group for group, _, _ in addresses)
        return [self._sample(*address) for address in addresses]

    def _sample(self, group: int, index: int, n: int) -> TokenSample:
        key = (group, index, n)
        if key not in self._built:
            self._built[key] = self._build(*self.rows.part(group, index), n)
            if len(self._built) > BUILT_SAMPLES:
                self._built.popitem(last=False)
        self._built.move_to_end(key)
        return self._built[key]

    def _build(self, row: dict[str, Any], conversations: list[list[Turn]], n: int) -> TokenSample:
        views = self.views(row)
        if views is None:  # it keeps its position in the order and adds nothing to the loss
            return filler_sample(self.layout)
        layout = self.layout
        if n != layout.tokens:
            layout = layout.model_copy(update={"tokens": n} if n != WHOLE else {"method": "none"})
        # text is cut at the same place for every N
        extra = self.extra_tokens + layout.view_length - self.layout.view_length
        max_tokens = self.block.max_tokens + extra * len(views)
        sizes = None if self.cached else sizes_of(row)
        arguments = (row["sample_id"], conversations, views, self.tokenizer, layout)
        sample = build_sample(*arguments, max_tokens=max_tokens, cached=self.cached, sizes=sizes)
        return replace(sample, whole=n == WHOLE and self.layout.rule.views_apart)


def first_trained(samples: Iterable[TokenSample]) -> TokenSample | None:
    """The first sample that has a token to predict."""
    return next((sample for sample in samples if len(sample.predict_id)), None)


def row_ids(rows: Rows, samples: Iterable[TokenSample]) -> tuple[str, ...]:
    """The ids of (n, 2) rows, whose samples are given without the fill."""
    ids = (sample.sample_id for sample in samples)
    return tuple(next(ids) if group >= 0 else "" for group in rows[:, 0].tolist())


class ImageBatches:
    """Batches of samples whose images are read as features, or decoded from their rows."""

    def __init__(
        self,
        tables: SampleTables,
        features: FeatureStore | LiveImages,
        model: VocoLlama,
        block: Training,
        teacher: Layout | None = None,
        live_groups: int = 2 * LIVE_GROUPS,
    ) -> None:
        rows = SampleRows(tables, block.share_vision, live_groups, encoded=isinstance(features, LiveImages))
        self.samples = TrainingSamples(tables, model.tokenizer, model.layout, block, images_of, rows=rows)
        self.teacher_samples: TrainingSamples | None = None
        if teacher is not None:
            extra = teacher.view_length - model.layout.view_length
            self.teacher_samples = TrainingSamples(
                tables, model.tokenizer, teacher, block, images_of, extra_tokens=extra, rows=rows
            )
        self.features, self.layout, self.width = features, model.layout, model.feature_width

    def micro_batches(self, rows: Rows, count: int, sizes: Tokens = None) -> StepData:
        """The samples at (n, 2) rows as `count` batches of nearly equal length. `sizes`: N of each row, or WHOLE."""
        return self._batches(rows, sizes, lambda lengths: split_evenly(lengths, count))

    def token_batches(self, rows: Rows, tokens: int, sizes: Tokens = None) -> StepData:
        """The samples at (n, 2) rows as few batches of at most `tokens` each, a longer sample alone; with a filler."""
        data = self._batches(rows, sizes, lambda lengths: split_by_tokens(lengths, tokens) or [[]])
        filler = self._collate([], [])
        return replace(data, filler=filler if self.teacher_samples is None else with_teacher(filler, filler))

    def _batches(self, rows: Rows, sizes: Tokens, split_lengths: Split) -> StepData:
        samples = self.samples.take(rows, sizes)
        if isinstance(self.features, LiveImages):
            self.features.load(self.samples.rows.part(group, row)[0] for group, row in rows.tolist() if group >= 0)
        else:
            self.features.load(dict.fromkeys(name for sample in samples for name in sample.media))
        split = split_lengths([len(sample) for sample in samples])
        batches = [self._collate(samples, indices) for indices in split]
        if self.teacher_samples is not None:
            teacher_samples = self.teacher_samples.take(rows)
            teachers = [self._collate(teacher_samples, indices) for indices in split]
            batches = [with_teacher(batch, teacher) for batch, teacher in zip(batches, teachers, strict=True)]
        cut, example = sum(sample.cut for sample in samples), first_trained(samples)
        return StepData(batches, cut, row_ids(rows, samples), example=example)

    def _collate(self, samples: list[TokenSample], indices: list[int]) -> Batch:
        chosen = [samples[index] for index in indices] or [filler_sample(self.layout)]
        return collate(chosen, self.features, (self.layout.vision_slots, self.width))
