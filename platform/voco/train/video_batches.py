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
        def places(row: dict[str, Any]) -> list[str] | None:
            if row["sample_id"] in frames.rejected:
                return None
            return [str(place) for place in frames.taken(row["sample_id"], block.max_frames)] if row["media"] else []

        self.samples = TrainingSamples(tables, model.tokenizer, model.layout, block, places, cached=True)
        self.frames, self.layout = frames, model.layout

    def passes(self, wanted: Rows, count: int) -> list[CachedBatch]:
        """The samples of (n, 2) places as `count` batches of nearly equal length, cached tokens counted."""
        samples = self.samples.take(wanted)
        dealt = split_evenly([len(sample) + len(sample.media) * self.layout.tokens for sample in samples], count)
        return [self.collate([samples[index] for index in row] or [filler_sample(self.layout)]) for row in dealt]

    def collate(self, samples: list[TokenSample]) -> CachedBatch:
        caches = [self._cache(sample) if sample.media else None for sample in samples]
        return collate_cached(samples, caches)

    def _cache(self, sample: TokenSample) -> VocoCache:
        return self.frames.read(sample.sample_id, [int(place) for place in sample.media], self.layout.tokens)
