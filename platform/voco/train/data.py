"""Rows of `samples/` to token samples and batches, row group by row group; nothing is read twice within a window."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from voco import rows, storage
from voco.anyres import Size
from voco.blocks import Training
from voco.features import FeatureStore
from voco.model.batch import Batch, collate, taught
from voco.model.voco_llama import VocoLlama
from voco.tokens import Layout, TokenSample, build, filler
from voco.train.order import WINDOW, Mix, Rows
from voco.train.packing import deal

IMAGES = [f"media.list.element.{name}" for name in ("sha256", "width", "height")]
COLUMNS = ["sample_id", *IMAGES, "conversations"]


class SampleTables:
    """Row groups of one or more `samples/` tables, numbered through.

    A sample is a whole row when `share_vision`, else one conversation of it (the papers' batch mix).
    """

    def __init__(self, uris: Sequence[str], weights: Sequence[float], share_vision: bool = True) -> None:
        self.files: list[pq.ParquetFile] = []
        self.groups: list[tuple[int, int]] = []  # file, row group in it
        sizes: list[int] = []
        owners: list[int] = []
        for table, uri in enumerate(uris):
            folder = storage.join(uri, "samples")
            for name in storage.names(folder):
                file = rows.open_parquet(storage.join(folder, name))
                for group in range(file.num_row_groups):
                    self.groups.append((len(self.files), group))
                    sizes.append(_samples_in(file, group, share_vision))
                    owners.append(table)
                self.files.append(file)
        self.mix = Mix(tuple(sizes), tuple(owners), tuple(weights))

    def read(self, group: int, columns: Sequence[str] = COLUMNS) -> list[dict[str, Any]]:
        """The rows of one row group as Python values, without media bytes unless they are asked for."""
        file, number = self.groups[group]
        found: list[dict[str, Any]] = self.files[file].read_row_group(number, columns=list(columns)).to_pylist()
        return found

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Every row of every table, in order."""
        for group in range(len(self.groups)):
            yield from self.read(group, columns)


def _samples_in(file: pq.ParquetFile, group: int, share_vision: bool) -> int:
    if share_vision:
        return int(file.metadata.row_group(group).num_rows)
    talks = file.read_row_group(group, columns=["conversations.list.element.source_id"])["conversations"]
    return sum(len(talk) for talk in talks.to_pylist())


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
            yield from [filler(self.layout)] * (1 if self.block.share_vision else len(row["conversations"]))
            return
        conversations = [one["turns"] for one in row["conversations"]]
        for part in [conversations] if self.block.share_vision else [[one] for one in conversations]:
            made = (row["sample_id"], part, views, self.tokenizer, self.layout)
            most = limit + self.more * len(views)
            yield build(*made, max_tokens=most, cached=self.cached, sizes=None if self.cached else sizes_of(row))


def images_of(row: dict[str, Any]) -> list[str]:
    """Content hashes of a row's images."""
    return [one["sha256"] for one in row["media"] or []]


def sizes_of(row: dict[str, Any]) -> list[Size]:
    """Height and width of a row's images."""
    return [(one["height"], one["width"]) for one in row["media"] or []]


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
        dealt = deal([len(sample) for sample in samples], count)
        batches = [self.collate([samples[index] for index in row] or [filler(self.layout)]) for row in dealt]
        if self.taught is None:
            return batches
        theirs = self.taught.take(wanted)
        read = [self.collate([theirs[index] for index in row] or [filler(self.layout)]) for row in dealt]
        return [taught(batch, teacher) for batch, teacher in zip(batches, read, strict=True)]

    def collate(self, samples: list[TokenSample]) -> Batch:
        return collate(samples, self.features, (self.layout.vision_slots, self.width))
