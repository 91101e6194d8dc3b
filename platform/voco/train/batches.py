"""Rows of `samples/` to token samples and batches, row group by row group; each is read once within a window."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from voco.job.config import Training
from voco.model.batch import Batch, collate, with_teacher
from voco.model.voco_llama import VocoLlama
from voco.precompute.feature_store import FeatureStore
from voco.sequence.chat_template import Turn
from voco.sequence.sequence import Layout, TokenSample, build_sample, filler_sample
from voco.store.samples import SampleTables, images_of, sizes_of
from voco.train.packing import split_evenly
from voco.train.sampler import WINDOW, Rows


class TrainingSamples:
    """Token samples by (row group, row in it); the last window of row groups is kept. A sample is tokenised when it is taken.

    `views` names the views of a row: images by their hash, or under `cached` the indices of its frames; None for a row whose
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
        extra_tokens: int = 0,  # of a view, beyond max_tokens: a teacher's text is cut like the student's
    ) -> None:
        self.tables, self.tokenizer, self.layout, self.block = tables, tokenizer, layout, block
        self.views, self.cached, self.extra_tokens = views, cached, extra_tokens
        self._groups: OrderedDict[int, list[tuple[dict[str, Any], list[list[Turn]]]]] = OrderedDict()
        self._built: dict[int, dict[int, TokenSample]] = {}  # by row group, then by row
        self.cut = 0  # text tokens left out of the samples that were taken

    def take(self, rows: Rows) -> list[TokenSample]:
        """The samples at (n, 2) rows; the fill of an epoch's tail is left out."""
        samples = [self._sample(group, row) for group, row in rows.tolist() if group >= 0]
        self.cut += sum(sample.cut for sample in samples)
        return samples

    def _sample(self, group: int, index: int) -> TokenSample:
        parts = self._group(group)
        built = self._built[group]
        if index not in built:
            built[index] = self._build(*parts[index])
        return built[index]

    def _group(self, group: int) -> list[tuple[dict[str, Any], list[list[Turn]]]]:
        """What each sample of the row group is made of: its row, and its conversations' turns."""
        if group not in self._groups:
            self._groups[group] = [part for row in self.tables.read(group) for part in self._parts(row)]
            self._built[group] = {}
            if len(self._groups) > 2 * WINDOW:
                oldest, _ = self._groups.popitem(last=False)
                del self._built[oldest]
        self._groups.move_to_end(group)
        return self._groups[group]

    def _parts(self, row: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[list[Turn]]]]:
        conversations = [conversation["turns"] for conversation in row["conversations"]]
        for part in [conversations] if self.block.share_vision else [[turns] for turns in conversations]:
            yield row, part

    def _build(self, row: dict[str, Any], conversations: list[list[Turn]]) -> TokenSample:
        views = self.views(row)
        if views is None:  # it keeps its position in the order and adds nothing to the loss
            return filler_sample(self.layout)
        max_tokens = self.block.max_tokens + self.extra_tokens * len(views)
        sizes = None if self.cached else sizes_of(row)
        arguments = (row["sample_id"], conversations, views, self.tokenizer, self.layout)
        return build_sample(*arguments, max_tokens=max_tokens, cached=self.cached, sizes=sizes)


class ImageBatches:
    """Batches of samples whose images are read as features."""

    def __init__(
        self, tables: SampleTables, features: FeatureStore, model: VocoLlama, block: Training, teacher: Layout | None = None
    ) -> None:
        self.samples = TrainingSamples(tables, model.tokenizer, model.layout, block, images_of)
        self.teacher_samples: TrainingSamples | None = None
        if teacher is not None:
            extra = teacher.view_length - model.layout.view_length
            self.teacher_samples = TrainingSamples(tables, model.tokenizer, teacher, block, images_of, extra_tokens=extra)
        self.features, self.layout, self.width = features, model.layout, model.feature_width

    def micro_batches(self, rows: Rows, count: int) -> list[Batch]:
        """The samples at (n, 2) rows as `count` batches of nearly equal length."""
        samples = self.samples.take(rows)
        split = split_evenly([len(sample) for sample in samples], count)
        batches = [self._collate(samples, indices) for indices in split]
        if self.teacher_samples is None:
            return batches
        teacher_samples = self.teacher_samples.take(rows)
        teachers = [self._collate(teacher_samples, indices) for indices in split]
        return [with_teacher(batch, teacher) for batch, teacher in zip(batches, teachers, strict=True)]

    def _collate(self, samples: list[TokenSample], indices: list[int]) -> Batch:
        chosen = [samples[index] for index in indices] or [filler_sample(self.layout)]
        return collate(chosen, self.features, (self.layout.vision_slots, self.width))
