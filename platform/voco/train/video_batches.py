"""Rows of `samples/` to batches of text that reads its frames from a frame cache."""

from __future__ import annotations

from typing import Any

from voco.job.config import VideoSft
from voco.model.batch import CachedBatch, collate_cached
from voco.model.cache import VocoCache
from voco.model.voco_llama import VocoLlama
from voco.precompute.frame_store import FrameStore
from voco.sequence.sequence import TokenSample, filler_sample
from voco.store.samples import SampleTables
from voco.train.batches import TrainingSamples
from voco.train.packing import split_evenly
from voco.train.sampler import Rows


class VideoBatches:
    """Batches of samples whose frames are read as caches."""

    def __init__(self, tables: SampleTables, frames: FrameStore, model: VocoLlama, block: VideoSft) -> None:
        def views(row: dict[str, Any]) -> list[str] | None:
            if row["sample_id"] in frames.rejected:
                return None
            return [str(index) for index in frames.select_frames(row["sample_id"], block.max_frames)] if row["media"] else []

        self.samples = TrainingSamples(tables, model.tokenizer, model.layout, block, views, cached=True)
        self.frames, self.layout = frames, model.layout

    def micro_batches(self, rows: Rows, count: int) -> list[CachedBatch]:
        """The samples at (n, 2) rows as `count` batches of nearly equal length, cached tokens counted."""
        samples = self.samples.take(rows)
        lengths = [len(sample) + len(sample.media) * self.layout.tokens for sample in samples]
        return [self._collate(samples, indices) for indices in split_evenly(lengths, count)]

    def _collate(self, samples: list[TokenSample], indices: list[int]) -> CachedBatch:
        chosen = [samples[index] for index in indices] or [filler_sample(self.layout)]
        return collate_cached(chosen, [self._cache(sample) if sample.media else None for sample in chosen])

    def _cache(self, sample: TokenSample) -> VocoCache:
        return self.frames.read(sample.sample_id, [int(index) for index in sample.media], self.layout.tokens)
