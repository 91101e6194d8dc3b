"""Rows of `samples/` to token samples and batches, row group by row group; nothing is read twice within a window."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from voco.job.config import Training
from voco.model.batch import Batch, collate, with_teacher
from voco.model.voco_llama import VocoLlama
from voco.precompute.feature_store import FeatureStore
from voco.sequence.sequence import Layout, TokenSample, build_sample, filler_sample
from voco.store.samples import SampleTables, images_of, sizes_of
from voco.train.packing import split_evenly
from voco.train.sampler import WINDOW, Rows


class TrainingSamples:
    """Token samples by (row group, place in it), with the last window of row groups kept.

    `views` names the views of a row: images by their hash, or under `cached` the places of its frames; None for a row whose
    frames could not be decoded.
    """

    def __init__(
        self,
        tables: SampleTables,
        tokenizer: Any,
        layout: Layout,
        block: Training,
        views: Callable[[dict[str, Any]], list[str] | None],
        cached: bool = False,
        more: int = 0,  # tokens that a view may take beyond the block's max_tokens: text is cut as for the student
    ) -> None:
        self.tables, self.tokenizer, self.layout, self.block, self.more = tables, tokenizer, layout, block, more
        self.views, self.cached = views, cached
        self.held: OrderedDict[int, list[TokenSample]] = OrderedDict()
        self.cut = 0  # text tokens left out of the samples that were taken

    def take(self, wanted: Rows) -> list[TokenSample]:
        """The samples of (n, 2) places; places of the epoch's tail are left out."""
        taken = [self._group(group)[place] for group, place in wanted.tolist() if group >= 0]
        self.cut += sum(sample.cut for sample in taken)
        return taken

    def _group(self, group: int) -> list[TokenSample]:
        if group not in self.held:
            self.held[group] = [sample for row in self.tables.read(group) for sample in self._build(row)]
            if len(self.held) > 2 * WINDOW:
                self.held.popitem(last=False)
        self.held.move_to_end(group)
        return self.held[group]

    def _build(self, row: dict[str, Any]) -> Iterator[TokenSample]:
        views, limit = self.views(row), self.block.max_tokens
        if views is None:  # its place in the order stays, and nothing is learned there
            yield from [filler_sample(self.layout)] * (1 if self.block.share_vision else len(row["conversations"]))
            return
        conversations = [one["turns"] for one in row["conversations"]]
        for part in [conversations] if self.block.share_vision else [[one] for one in conversations]:
            made = (row["sample_id"], part, views, self.tokenizer, self.layout)
            most = limit + self.more * len(views)
            yield build_sample(*made, max_tokens=most, cached=self.cached, sizes=None if self.cached else sizes_of(row))


class ImageBatches:
    """Batches of samples whose images are read as features."""

    def __init__(
        self, tables: SampleTables, features: FeatureStore, model: VocoLlama, block: Training, teacher: Layout | None = None
    ) -> None:
        self.samples = TrainingSamples(tables, model.tokenizer, model.layout, block, images_of)
        self.taught: TrainingSamples | None = None
        if teacher is not None:
            more = teacher.view_length - model.layout.view_length
            self.taught = TrainingSamples(tables, model.tokenizer, teacher, block, images_of, more=more)
        self.features, self.layout, self.width = features, model.layout, model.feature_width

    def passes(self, wanted: Rows, count: int) -> list[Batch]:
        """The samples of (n, 2) places as `count` batches of nearly equal length."""
        samples = self.samples.take(wanted)
        dealt = split_evenly([len(sample) for sample in samples], count)
        batches = [self.collate([samples[index] for index in row] or [filler_sample(self.layout)]) for row in dealt]
        if self.taught is None:
            return batches
        theirs = self.taught.take(wanted)
        read = [self.collate([theirs[index] for index in row] or [filler_sample(self.layout)]) for row in dealt]
        return [with_teacher(batch, teacher) for batch, teacher in zip(batches, read, strict=True)]

    def collate(self, samples: list[TokenSample]) -> Batch:
        return collate(samples, self.features, (self.layout.vision_slots, self.width))
