"""Rows of `samples/` to batches of text that reads its frames from a frame cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from voco.job.config import VideoSft
from voco.model.batch import CachedBatch, collate_cached
from voco.model.cache import VocoCache
from voco.model.voco_llama import VocoLlama
from voco.precompute.frame_store import FrameStore
from voco.sequence.sequence import TokenSample, filler_sample
from voco.store.samples import SampleTables
from voco.train.batches import SampleRows, StepData, TrainingSamples
from voco.train.packing import split_evenly
from voco.train.sampler import LIVE_GROUPS, Rows

READERS = 8  # caches that are read at a time
Shown = tuple[str, tuple[str, ...]]  # a sample and its frames


class VideoBatches:
    """Batches of samples whose frames are read as caches."""

    def __init__(
        self, tables: SampleTables, frames: FrameStore, model: VocoLlama, block: VideoSft, live_groups: int = 2 * LIVE_GROUPS
    ) -> None:
        def views(row: dict[str, Any]) -> list[str] | None:
            if row["sample_id"] in frames.rejected:
                return None
            return [str(index) for index in frames.select_frames(row["sample_id"], block.max_frames)] if row["media"] else []

        rows = SampleRows(tables, block.share_vision, live_groups)
        self.samples = TrainingSamples(tables, model.tokenizer, model.layout, block, views, cached=True, rows=rows)
        self.frames, self.layout = frames, model.layout

    def micro_batches(self, rows: Rows, count: int) -> StepData:
        """The samples at (n, 2) rows as `count` batches of nearly equal length, cached tokens counted."""
        samples = self.samples.take(rows)
        lengths = [len(sample) + len(sample.media) * self.layout.tokens for sample in samples]
        shown = {(sample.sample_id, sample.media): sample for sample in samples if sample.media}
        with ThreadPoolExecutor(READERS) as readers:  # several questions about one video read its cache once
            caches = dict(zip(shown, readers.map(self._cache, shown.values()), strict=True))
        batches = [self._collate(samples, caches, indices) for indices in split_evenly(lengths, count)]
        return StepData(batches, sum(sample.cut for sample in samples))

    def _collate(self, samples: list[TokenSample], caches: dict[Shown, VocoCache], indices: list[int]) -> CachedBatch:
        chosen = [samples[index] for index in indices] or [filler_sample(self.layout)]
        return collate_cached(chosen, [caches.get((sample.sample_id, sample.media)) for sample in chosen])

    def _cache(self, sample: TokenSample) -> VocoCache:
        return self.frames.read(sample.sample_id, [int(index) for index in sample.media], self.layout.tokens)
